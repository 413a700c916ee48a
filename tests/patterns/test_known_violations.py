# SPDX-License-Identifier: Apache-2.0
"""`check` on weights that break a pattern in a known number of places."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxslim import ConfigError
from fxslim.nn import MaskedConv2d, MaskedLinear, MaskedMultiheadAttention
from fxslim.patterns import NM, Block, Unstructured, check

seeds = st.integers(0, 2**31)


@given(seed=seeds, num_broken=st.integers(0, 24), axis=st.sampled_from([0, 1]))
def test_groups_that_are_too_full(seed: int, num_broken: int, axis: int) -> None:
    """4 rows of 10 entries at 2 positions: 3 groups of 4, 4, 2 in each; a group of 2 can't be too full for 2:4."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.zeros(4, 2, 3, 4)
    places = torch.randperm(16, generator=generator)
    full = groups[:, :, :2].reshape(16, 4)
    full[:, 1:3] = torch.rand(16, 2, generator=generator) + 0.1
    full[places[:num_broken], 0] = -1.0
    groups[:, :, :2], groups[:, :, 2, :2] = full.view(4, 2, 2, 4), torch.nan
    weight = groups.flatten(2)[:, :, :10].transpose(1, 2)
    found = check(weight if axis == 1 else weight.transpose(0, 1), NM(2, 4, axis))
    assert (found.groups, found.violations) == (24, min(num_broken, 16))
    assert found.ok == (num_broken == 0)
    assert found.sparsity == pytest.approx(1 - (32 + min(num_broken, 16) + 16) / 80)


@given(seed=seeds, num_zero=st.integers(0, 24), per_position=st.booleans())
def test_blocks_that_should_be_0_and_are_not(seed: int, num_zero: int, per_position: bool) -> None:
    """(5, 7, 2, 2) by blocks of 3 filters x 4 channels: 2 x 2, at each of 4 positions or over all of them."""
    generator = torch.Generator().manual_seed(seed)
    blocks, weight = 16 if per_position else 4, torch.zeros(5, 7, 4)
    for block in torch.randperm(blocks, generator=generator)[num_zero:].tolist():
        pair, place = (block // 4, block % 4) if per_position else (block, slice(None))
        o, i = 3 * (pair // 2), 4 * (pair % 2)
        # One entry is enough to keep a block.
        weight[o : o + 3, i : i + 4][-1, -1, place] = 0.5
    found = check(weight.view(5, 7, 2, 2), Block(cin=4, cout=3, per_position=per_position, ratio=0.5))
    assert (found.groups, found.violations) == (blocks, max(0, blocks // 2 - num_zero))


@given(zeros=st.lists(st.integers(0, 10), min_size=3, max_size=3))
def test_entries_that_should_be_0_and_are_not(zeros: list[int]) -> None:
    weight = torch.ones(3, 5, 2)
    for row, count in zip(weight, zeros, strict=True):
        row.view(-1)[:count] = 0
    each = check(weight, Unstructured(0.4, per_output=True))
    assert (each.groups, each.violations) == (30, sum(max(0, 4 - count) for count in zeros))
    whole = check(weight, Unstructured(0.4))
    assert (whole.violations, whole.sparsity) == (max(0, 12 - sum(zeros)), pytest.approx(sum(zeros) / 30))


def test_a_layer_is_looked_at_as_it_computes() -> None:
    layer = MaskedConv2d(8, 8, 3, pattern="2:4")
    assert check(layer, "2:4").ok
    assert check(layer.weight, "2:4").violations == check(nn.Conv2d(8, 8, 3), "2:4").violations == 8 * 2 * 9
    assert check(layer.weight_mask, "2:4").sparsity == 0.5


def test_a_transposed_layer_is_grouped_along_its_inputs() -> None:
    layer = nn.ConvTranspose1d(8, 3, 1)
    with torch.no_grad():
        layer.weight[2:4] = 0
        layer.weight[4:7] = 0
    assert check(layer, "2:4").violations == 0
    assert check(layer, NM(1, 4)).violations == 3


def test_patterns_without_a_ratio_only_measure() -> None:
    assert check(torch.eye(4), "unstructured").sparsity == 0.75
    assert check(torch.ones(64, 32), "cin32cout64").ok


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.ones(4), r"at least 2 dims: \(out, in\); got a Tensor of shape \(4,\)"),
        ([[1.0]], "got a list"),
        (nn.ReLU(), "got a ReLU"),
        (nn.BatchNorm2d(4), r"got a BatchNorm2d of shape \(4,\)"),
        (nn.Linear(8, 4, device="meta"), r"a Linear of shape \(4, 8\) is on the meta device and has no values"),
        (nn.MultiheadAttention(8, 2), "got a MultiheadAttention"),
        (MaskedMultiheadAttention(8, 2, pattern="2:4"), "got a MaskedMultiheadAttention"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_weight(given, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(given, "2:4")


def test_the_pattern_is_named_in_errors() -> None:
    with pytest.raises(ConfigError, match="2:3:4"):
        check(MaskedLinear(8, 8, pattern="2:4"), "2:3:4")
