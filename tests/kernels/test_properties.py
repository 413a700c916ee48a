# SPDX-License-Identifier: Apache-2.0
"""What must hold for any data: idempotence, the size of errors, exact counts, agreement with torch."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fxslim import kernels
from tests.strategies import grids, tensors


@given(x=tensors(special=False), grid=grids(), scale=st.floats(1e-3, 10.0), data=st.data())
def test_fake_quantize_is_idempotent_and_off_by_half_a_step(x, grid, scale, data) -> None:
    zero_point = data.draw(st.integers(*grid))
    x = x.double()
    y = kernels.fake_quantize(x, scale, zero_point, *grid)
    assert torch.equal(kernels.fake_quantize(y, scale, zero_point, *grid), y)
    inside = (x / scale + zero_point >= grid[0]) & (x / scale + zero_point <= grid[1])
    assert torch.all((y - x).abs()[inside] <= scale / 2 * (1 + 1e-9))
    steps = (y / scale).round() + zero_point
    assert torch.all((steps >= grid[0]) & (steps <= grid[1]))


@given(seed=st.integers(0, 10**6), grid=grids(), exponent=st.integers(-9, 2), data=st.data())
def test_fake_quantize_equals_torch_where_its_arithmetic_is_exact(seed, grid, exponent, data) -> None:
    """torch multiplies by 1 / scale; with a power of two that is the same as dividing."""
    zero_point = data.draw(st.integers(*grid))
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 3
    want = torch.fake_quantize_per_tensor_affine(x, 2.0**exponent, zero_point, *grid)
    # torch rounds x / scale + zero_point together, which differs at ties for odd zero points.
    ties = (x / 2.0**exponent).frac().abs() == 0.5
    got = kernels.fake_quantize(x, 2.0**exponent, zero_point, *grid)
    assert torch.equal(got[~ties], want[~ties])


@given(x=tensors(min_dims=1), n=st.integers(1, 40), extra=st.integers(0, 12), data=st.data())
def test_nm_mask_keeps_exactly_n_of_m_largest(x, n, extra, data) -> None:
    m, axis = n + extra, data.draw(st.integers(0, x.dim() - 1))
    mask = kernels.nm_mask(x, n, m, axis)
    assert mask.shape == x.shape
    magnitudes = torch.nan_to_num(x.abs().double(), nan=1e300, posinf=1e299)
    rows = [t.movedim(axis, -1).reshape(-1, x.shape[axis]) if x.numel() else [] for t in (magnitudes, mask)]
    for values, kept in zip(*rows, strict=True):
        for start in range(0, len(values), m):
            group, chosen = values[start : start + m].tolist(), kept[start : start + m].tolist()
            best = sorted(range(len(group)), key=lambda i: (-group[i], i))[:n]
            assert [i in best for i in range(len(group))] == chosen


@given(x=tensors(min_dims=1))
def test_observe_min_max_equals_aminmax(x) -> None:
    if x.numel() == 0:
        return
    low, high = kernels.observe_min_max(x)
    want = torch.aminmax(x)
    torch.testing.assert_close(low, want.min.to(low.dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(high, want.max.to(low.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_keep_the_memory_format(channels_last, device) -> None:
    x = torch.randn(2, 8, 5, 6, device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    inf = torch.full((1,), torch.inf, device=device)
    for y in (
        kernels.fake_quantize(x, 0.1, 0, -8, 7),
        kernels.fake_quantize_float(x, 0.1, "fp8_e4m3"),
        kernels.observe_fake_quantize(x, inf, -inf, -8, 7)[0],
        kernels.nm_mask(x, 2, 4),
        kernels.block_mask(x, 0.5, 4, 2),
    ):
        assert y.stride() == x.stride()


@given(x=tensors(), start=st.integers(-90, 90), bins=st.integers(1, 100), exponent=st.integers(-8, 3))
def test_bins_between_multiples_of_a_power_of_two_are_exact(x, start, bins, exponent) -> None:
    """Every value is in the bin where numpy finds it, however small it is beside the range."""
    assume(x.numel() > 0)
    edges = np.arange(start, start + bins + 1) * 2.0**exponent
    counts, smallest, largest = kernels.observe_histogram(x, edges[0].item(), edges[-1].item(), bins)
    values = x.double().numpy().ravel()
    want = np.searchsorted(edges[1:-1], values[~np.isnan(values)], side="right")
    assert counts.tolist() == np.bincount(want, minlength=bins).tolist()
    if np.isnan(values).any():
        assert smallest.isnan()
        assert largest.isnan()
    else:
        assert (smallest.item(), largest.item()) == (values.min(), values.max())


@given(x=tensors(special=False), low=st.floats(-5, 4), width=st.floats(0.1, 9), bins=st.integers(1, 300))
def test_any_bins_hold_what_numpy_counts_but_for_values_at_an_edge(x, low, width, bins) -> None:
    assume(x.numel() > 0)
    counts, *_ = kernels.observe_histogram(x, low, low + width, bins)
    assert counts.sum() == x.numel()
    values, slack = x.double().numpy().ravel(), width / bins * 1e-3
    edges = low + width * np.arange(1, bins) / bins
    below = counts.cumsum(0)[:-1].numpy()
    assert np.all(np.searchsorted(np.sort(values), edges - slack) <= below)
    assert np.all(below <= np.searchsorted(np.sort(values), edges + slack, side="right"))
