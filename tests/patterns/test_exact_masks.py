# SPDX-License-Identifier: Apache-2.0
"""Each pattern's mask against plain loops: exact counts in every group, block, row; ties, tails, NaN."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxslim.patterns import NM, Block, Unstructured, check
from tests.strategies import DTYPES, LAYOUTS, lay_out

ratios = st.floats(0, 1, exclude_max=True)
any_values = st.floats(-1e4, 1e4, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])


@st.composite
def weights(draw: st.DrawFn, max_side: int = 9) -> Tensor:
    """(out, in, *kernel) of any dtype and layout; few values, so that ties are many, some of them NaN."""
    sides = [draw(st.integers(1, max_side)) for _ in range(2)]
    shape = (*sides, *draw(st.lists(st.integers(1, 3), max_size=3)))
    palette = torch.tensor(draw(st.lists(any_values, min_size=1, max_size=6)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = palette[torch.randint(len(palette), shape, generator=generator)]
    return lay_out(values.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))


def order_of(value: float) -> float:
    """The magnitude; NaN counts for more than infinity."""
    return math.inf if math.isnan(value) else math.atan(abs(value))


def highest(values: list[float], kept: int) -> list[bool]:
    """So many stay; of equal ones the earlier."""
    order = sorted(range(len(values)), key=lambda i: (-order_of(values[i]), i))
    return [i in order[:kept] for i in range(len(values))]


@given(weight=weights(), n=st.integers(1, 5), more=st.integers(0, 4), axis=st.sampled_from([0, 1]))
def test_n_of_m_keeps_the_highest_of_each_group(weight: Tensor, n: int, more: int, axis: int) -> None:
    m, mask = n + more, NM(n, n + more, axis).mask(weight)
    other = weight.shape[1 - axis]
    for across, place in product(range(other), product(*map(range, weight.shape[2:]))):
        at = [(i, across, *place) if axis == 0 else (across, i, *place) for i in range(weight.shape[axis])]
        for start in range(0, len(at), m):
            group = at[start : start + m]
            want = highest([weight[index].item() for index in group], n)
            assert [mask[index].item() for index in group] == want
    assert check(mask, NM(n, m, axis)).ok


@given(weight=weights(max_side=6), ratio=ratios, per_output=st.booleans())
def test_unstructured_removes_the_lowest_of_the_weight_or_of_each_output(weight, ratio, per_output) -> None:
    mask = Unstructured(ratio, per_output).mask(weight)
    parts = [weight[o] for o in range(len(weight))] if per_output else [weight]
    masks = [mask[o] for o in range(len(weight))] if per_output else [mask]
    for part, got in zip(parts, masks, strict=True):
        values = part.flatten().tolist()
        assert got.flatten().tolist() == highest(values, len(values) - round(ratio * len(values)))


@given(weight=weights(), ratio=ratios, cin=st.integers(1, 10), cout=st.integers(1, 10), per_position=st.booleans())
def test_blocks_go_whole_and_exactly_so_many(weight: Tensor, ratio, cin, cout, per_position) -> None:
    pattern = Block(cin=cin, cout=cout, per_position=per_position, ratio=ratio)
    mask = pattern.mask(weight)
    places = list(product(*map(range, weight.shape[2:])))
    gone = total = 0
    for o, i in product(range(0, weight.shape[0], cout), range(0, weight.shape[1], cin)):
        for together in [[p] for p in places] if per_position else [places]:
            kept = {mask[(slice(o, o + cout), slice(i, i + cin), *place)].any().item() for place in together}
            kept |= {mask[(slice(o, o + cout), slice(i, i + cin), *place)].all().item() for place in together}
            assert len(kept) == 1
            gone, total = gone + (kept == {False}), total + 1
    assert total == pattern.num_blocks(tuple(weight.shape))
    assert gone == pattern.num_removed(tuple(weight.shape)) == min(round(ratio * total), total - 1)
    assert check(mask, pattern).groups == total
    assert check(mask, pattern).ok


@pytest.mark.parametrize(
    "shape, num_blocks, whole",
    [
        ((64, 64, 3, 3), 18, 2),
        ((64, 32, 1, 1), 1, 1),
        ((65, 33, 2, 2), 16, 4),
        ((10, 3, 7, 7), 49, 1),
        ((128, 64), 4, 4),
        ((64, 96, 5), 15, 3),
        ((1, 1, 2, 2, 2), 8, 1),
    ],
    ids=str,
)
def test_the_number_of_blocks(shape: tuple[int, ...], num_blocks: int, whole: int) -> None:
    """Where there are fewer than 32 channels or 64 filters all of them are one block; what is left over is another."""
    assert Block().num_blocks(shape) == num_blocks
    assert Block(per_position=False).num_blocks(shape) == whole
    assert check(torch.ones(shape), Block(ratio=0.5)).groups == num_blocks


def test_a_mask_of_whole_kernels_is_legal_per_position() -> None:
    whole = Block(cin=4, cout=8, per_position=False, ratio=0.5)
    mask = whole.mask(torch.rand(16, 8, 3, 3))
    found = check(mask, Block(cin=4, cout=8, ratio=0.5))
    assert (found.ok, found.groups, found.sparsity) == (True, 36, 0.5)


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(1, 4, 0), Block(cin=4, cout=4, ratio=0.5), Unstructured(0.3)], ids=str
)
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_equal_scores_still_give_an_exact_mask(pattern, value: float, device: torch.device) -> None:
    mask = pattern.mask(torch.full((8, 8, 2, 2), value, device=device))
    assert mask.device.type == device.type
    assert int((~mask).sum()) == round(pattern.removed() * mask.numel())


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(2, 4, 0), Block(cin=4, cout=4, ratio=0.5), Unstructured(0.5)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_does_not_depend_on_the_layout(pattern, dtype: torch.dtype, device: torch.device) -> None:
    scores = torch.rand(8, 12, 3, 3, device=device).to(dtype)
    want = pattern.mask(scores)
    for layout in LAYOUTS:
        assert torch.equal(pattern.mask(lay_out(scores, layout)), want)


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(cin=4, cout=4, ratio=0.5), Unstructured(0.5)], ids=str)
def test_masks_of_weights_without_values_or_entries(pattern) -> None:
    assert pattern.mask(torch.empty(8, 8, 3, 3, device="meta")).shape == (8, 8, 3, 3)
    assert pattern.mask(torch.empty(0, 8)).shape == (0, 8)
    assert check(torch.empty(0, 8), pattern).ok
    assert check(torch.empty(8, 0), pattern).ok
