# SPDX-License-Identifier: Apache-2.0
"""Fixtures: every test that takes `device` runs on every device there is."""

import os
import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.torch_switches import switches

hypothesis.settings.register_profile("fxslim", deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fxslim"))

# Networks and inputs made while tests are collected, too, are the same in every run.
torch.manual_seed(0)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def own_seed(request: pytest.FixtureRequest) -> None:
    """Each test starts from a seed of its own, whatever ran before it: a failure can be seen again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """What one test leaves switched would be found by another, in some order only."""
    before = switches()
    yield
    assert switches() == before


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run only when asked for with -m."""
    if config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
