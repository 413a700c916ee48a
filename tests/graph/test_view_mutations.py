# SPDX-License-Identifier: Apache-2.0
"""Faults put into the rules of views, sizes and attention: the proof must catch each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxslim.graph import kept_order, size_checks
from fxslim.graph.labels import LabelSpace
from fxslim.graph.rules import attention, parts, reshaping
from tests.graph.random_networks import randomise
from tests.graph.test_attention import Transformer, tiny_swin
from tests.graph.test_attention import X as TOKENS
from tests.graph.test_family_mutations import replaced
from tests.graph.test_mutations import Patch, caught, changed_result, no_balance, rolled_channels
from tests.graph.test_sizes_and_views import CASES, Reads
from tests.graph.test_sizes_and_views import X as PICTURE


def no_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside views nothing is unified."""
    original = reshaping._split

    def split(propagation, node, ids, dims, shrinking):
        with monkeypatch.context() as inside:
            inside.setattr(LabelSpace, "unify", lambda *_: None)
            return original(propagation, node, ids, dims, shrinking)

    monkeypatch.setattr(reshaping, "_split", split)


def heads_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the three projections go each on its own."""
    original = attention._projections

    def projections(propagation, *rest):
        with monkeypatch.context() as inside:
            inside.setattr(LabelSpace, "unify", lambda *_: None)
            return original(propagation, *rest)

    monkeypatch.setattr(attention, "_projections", projections)


def no_check(*_, **__) -> None:
    """Sizes are not looked at."""


FAULTS: dict[str, tuple[str, Patch]] = {
    "order behind a shuffle forgotten": ("shuffle", replaced(kept_order.KeptOrder, "run", lambda *_: None)),
    "neighbours not tied": ("neighbours compete", no_ties),
    "an attribute not changed": (
        "slice by an attribute", replaced(size_checks.NewSizes, "new_attributes", lambda _: ()),
    ),
    "attributes of parts not looked at": ("split in attributes", replaced(parts, "follow_count", no_check)),
    "size of a view not looked at": ("view by an attribute", replaced(reshaping, "follow_count", no_check)),
    "slice shifted": ("computed half", changed_result("slice", change=rolled_channels)),
    "part shifted": ("split in attributes", changed_result("split_with_sizes", change=rolled_channels)),
    "view shifted": ("view by an attribute", changed_result("view", change=rolled_channels)),
    "literal bound not kept": ("literal head", replaced(parts, "_settle_bound", lambda *_: None)),
    "halves of a chunk not balanced": ("chunk", no_balance),
    "width of the heads not balanced": ("attention module", no_balance),
    "heads of a module not tied": ("attention module", heads_apart),
    "number of heads not changed": (
        "attention split", replaced(size_checks.NewSizes, "new_attributes", lambda _: ()),
    ),
    "entries of a head not tied": ("attention split", no_ties),
    "product shifted": ("attention split", changed_result("bmm", change=rolled_channels)),
    "table of positions shifted": ("windows", changed_result("index", change=rolled_channels)),
}  # fmt: skip


def networks_of(name: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def build(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        if name == "windows":
            return randomise(tiny_swin(), seed), torch.randn(1, 3, 32, 32)
        if name.startswith("attention"):
            return randomise(Transformer(name.partition(" ")[2]), seed), TOKENS
        return randomise(Reads(*CASES[name]), seed), PICTURE

    return build


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, patch = FAULTS[name]
    patch(monkeypatch)
    assert caught(networks_of(network), networks=12), f"{name}: no network noticed"


@pytest.mark.parametrize("network", sorted({network for network, _ in FAULTS.values()}))
def test_without_a_fault_nothing_is_caught(network: str) -> None:
    assert not caught(networks_of(network), networks=6)
