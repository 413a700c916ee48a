# SPDX-License-Identifier: Apache-2.0
"""Masks under DistributedDataParallel: equal on both ranks after every step, though they see other data."""

import pytest
import torch

from fxslim.patterns import check
from tests.process_pairs import run_two_ranks

SECONDS = 120


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, torch.Tensor]]]]:
    """What each of two processes saw."""
    return run_two_ranks("tests/nn/two_ranks.py", tmp_path_factory.mktemp("ranks"), SECONDS)


@pytest.mark.parametrize("case", ["0.0 zero", "0.0 sr_ste", "2.0 zero", "2.0 sr_ste", "two forwards"])
def test_masks_are_equal_on_both_ranks(ranks, case: str) -> None:
    changed = False
    before = None
    for one, other in zip(ranks[0][case], ranks[1][case], strict=True):
        for layer in ("0", "4"):
            mask, weight = one[f"{layer}.weight_mask"], one[f"{layer}.weight"]
            assert torch.equal(mask, other[f"{layer}.weight_mask"])
            assert torch.equal(weight, other[f"{layer}.weight"])
            assert check(mask, "2:4").ok
        assert not torch.equal(one["1.running_mean"], other["1.running_mean"]), "the ranks saw the same data"
        changed = changed or (before is not None and not torch.equal(before, one["4.weight_mask"]))
        before = one["4.weight_mask"]
    # Without their gradient masked weights stand still: only sr_ste and regrow bring some back.
    assert changed or case == "0.0 zero"
