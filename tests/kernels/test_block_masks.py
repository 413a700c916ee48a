# SPDX-License-Identifier: Apache-2.0
"""block_mask against plain loops on exact fractions: which blocks go, how many, tails, ties, near ties."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim import kernels
from fxslim.kernels import block_masking
from tests.strategies import DTYPES, LAYOUTS, lay_out


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Whole numbers, so that sums are exact and ties are many."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)), *draw(st.lists(st.integers(1, 3), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-3, 4, shape, generator=generator)
    return lay_out(values.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))


sizes = st.integers(1, 10)
ratios = st.floats(0, 1, exclude_max=True)


def blocks_of(shape: tuple[int, ...], cin: int, cout: int, per_position: bool) -> list[list[tuple[int, ...]]]:
    """The elements of each block, in the order of the blocks."""
    positions = list(product(*map(range, shape[2:])))
    found = []
    for o, i in product(range(0, shape[0], cout), range(0, shape[1], cin)):
        pairs = list(product(range(o, min(o + cout, shape[0])), range(i, min(i + cin, shape[1]))))
        for places in [[p] for p in positions] if per_position else [positions]:
            found.append([(*pair, *place) for pair in pairs for place in places])
    return found


@given(weight=weights(), ratio=ratios, cin=sizes, cout=sizes, per_position=st.booleans())
def test_the_blocks_of_the_smallest_mean_go(weight, ratio, cin, cout, per_position) -> None:
    blocks = blocks_of(tuple(weight.shape), cin, cout, per_position)
    means = [sum(Fraction(abs(weight[at].item())) for at in block) / len(block) for block in blocks]
    going = sorted(range(len(blocks)), key=lambda b: (means[b], b))[: min(round(ratio * len(blocks)), len(blocks) - 1)]
    want = torch.ones(weight.shape, dtype=torch.bool)
    for at in (at for b in going for at in blocks[b]):
        want[at] = False
    assert torch.equal(kernels.block_mask(weight, ratio, cin, cout, per_position), want)


@given(weight=weights(), ratio=ratios, cin=sizes, cout=sizes)
def test_a_mask_of_whole_kernels_is_one_of_positions(weight, ratio, cin, cout) -> None:
    mask = kernels.block_mask(weight, ratio, cin, cout, per_position=False)
    num_whole = len(blocks_of(tuple(weight.shape), cin, cout, per_position=False))
    gone = 0
    for block in blocks_of(tuple(weight.shape), cin, cout, per_position=True):
        kept = {mask[at].item() for at in block}
        assert len(kept) == 1
        gone += kept == {False}
    assert gone == min(round(ratio * num_whole), num_whole - 1) * weight.shape[2:].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_position", [True, False])
def test_tails_compete_by_their_mean(dtype, per_position, device) -> None:
    """The last blocks are smaller: one that is heavier per element stays, one that is lighter goes."""
    weight = torch.ones(70, 40, 3, 3, dtype=dtype, device=device)
    weight[64:, :32], weight[:64, 32:] = 1.5, 0.5
    mask = kernels.block_mask(weight, 0.25, per_position=per_position)
    assert not mask[:64, 32:].any()
    assert mask[64:].all()
    assert mask[:64, :32].all()


def test_of_equal_blocks_the_first_go(device) -> None:
    mask = kernels.block_mask(torch.ones(4, 4, 2, device=device), 0.5, cin=2, cout=2)
    assert not mask[:2].any()
    assert mask[2:].all()


def test_the_last_block_stays_and_half_rounds_to_even(device) -> None:
    weight = torch.arange(1.0, 6.0, device=device).reshape(5, 1)
    assert kernels.block_mask(weight, 0.999, cout=1).flatten().tolist() == [False] * 4 + [True]
    assert kernels.block_mask(weight, 0.5, cout=1).sum() == 3
    assert kernels.block_mask(weight, 0, cout=1).all()
    assert kernels.block_mask(weight, 0.9).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_position", [True, False])
def test_nan_and_infinity_stay(dtype, per_position, device) -> None:
    weight = torch.full((6, 2, 2), 100.0, dtype=dtype, device=device)
    weight[1, 0], weight[3, 1], weight[4, 1] = torch.nan, -torch.inf, -torch.nan
    assert kernels.block_mask(weight, 1 / 2, 2, 1, per_position)[[1, 3, 4]].all()
    mask = kernels.block_mask(weight, 2 / 3, 2, 1, per_position)
    assert mask[[1, 4]].all()
    assert not mask[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_near_ties_fall_alike_in_every_layout(layout, per_position, dtype, device) -> None:
    """Blocks of the same 7 x 5 values in another order: sums differ in the last bit, by the order of the sum."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(35, generator=generator, dtype=torch.float64).exp().pow(9).to(dtype)
    places = torch.rand(30, 20, 3, 3, 7, 5, generator=generator).flatten(4).argsort(-1).view(30, 20, 3, 3, 7, 5)
    plain = values[places].permute(0, 4, 1, 5, 2, 3).reshape(210, 100, 3, 3)
    num_removed = 300 * (9 if per_position else 1)
    want = block_masking._reference(plain, num_removed, 5, 7, per_position, False)
    upside_down = plain.view(30, 7, 100, 3, 3).flip(1).reshape(plain.shape)
    assert not torch.equal(want, block_masking._reference(upside_down, num_removed, 5, 7, per_position, False))
    got = kernels.block_mask(lay_out(plain, layout).to(device), 0.5, 5, 7, per_position)
    assert torch.equal(got.cpu(), want)
