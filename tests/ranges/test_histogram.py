# SPDX-License-Identifier: Apache-2.0
"""The running histogram: exact, whatever the order, the split and the number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim import CalibrationError, ConfigError
from fxslim.ranges import Histogram
from tests.ranges.samples import SAMPLES
from tests.strategies import lay_out, tensors


def assert_equal(a: Histogram, b: Histogram) -> None:
    for name, value in a.state().items():
        assert torch.equal(value, b.state()[name]), name


def observe_all(batches, bins: int = 64) -> Histogram:
    seen = Histogram.empty(bins)
    for batch in batches:
        seen = seen.observe(batch)
    return seen


@given(x=tensors(special=False), bins=st.integers(16, 300))
def test_counts_are_those_of_numpy(x, bins) -> None:
    if x.numel() == 0:
        return
    seen = Histogram.empty(bins).observe(x)
    values = x.double().numpy().ravel()
    edges = (np.arange(bins + 1) + seen.start.item()) * seen.width.item()
    assert edges[0] <= values.min() <= values.max() < edges[-1]
    assert (seen.low.item(), seen.high.item()) == (values.min(), values.max())
    assert seen.counts.tolist() == np.histogram(values, edges)[0].tolist()
    assert np.log2(seen.width.item()) % 1 == 0
    reached = np.floor(values.max() / seen.width.item()) - np.floor(values.min() / seen.width.item()) + 1
    # Half as wide would not fit, unless bins could then not be told apart.
    finest = max(2.0**-100, np.abs(values).max() * 2.0**-20)
    assert reached >= (bins - 1) / 2 or seen.width.item() <= 2 * finest


@given(st.lists(st.tuples(tensors(special=False, max_dims=2), st.floats(-50, 50)), max_size=5), st.randoms())
def test_order_split_and_ranks_do_not_matter(batches, random) -> None:
    batches = [x.float() + shift for x, shift in batches]
    whole = observe_all(batches)
    assert_equal(observe_all([torch.cat([x.reshape(-1) for x in batches])] if batches else []), whole)
    shuffled = random.sample(batches, len(batches))
    assert_equal(observe_all(shuffled), whole)
    assert_equal(observe_all([part for x in batches for part in x.reshape(-1).split(7)]), whole)
    cut = len(batches) // 2
    assert_equal(observe_all(shuffled[:cut]).merged(observe_all(shuffled[cut:])), whole)
    assert_equal(Histogram.from_state(whole.state()), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_dtypes_and_layouts_see_the_same_values(dtype, layout, device) -> None:
    x = torch.randn(3, 5, 8, 7).to(dtype)
    want = Histogram.empty().observe(x.double())
    got = Histogram.empty().observe(lay_out(x, layout).to(device))
    assert torch.equal(got.counts.cpu(), want.counts)
    assert got.low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_one_pass_unless_the_range_grows(monkeypatch) -> None:
    from fxslim.ranges import histogram

    passes = []
    for name in ("observe_histogram", "observe_min_max"):
        kernel = getattr(histogram, name)
        monkeypatch.setattr(histogram, name, lambda *a, kernel=kernel, name=name: (passes.append(name), kernel(*a))[1])
    seen = Histogram.empty(64).observe(torch.tensor([-1.0, 1.0]))
    passes.clear()
    seen = seen.observe(torch.tensor([-0.5, 0.9]))
    assert passes == ["observe_histogram"]
    seen.observe(torch.tensor([9.0]))
    assert len(passes) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("first", [True, False])
def test_data_that_is_not_finite(value: float, first: bool) -> None:
    seen = Histogram.empty() if first else Histogram.empty().observe(torch.ones(9))
    with pytest.raises(CalibrationError, match=r"2 of 10 observed entries are NaN or infinite.*overflows"):
        seen.observe(torch.tensor([value, 1.0, value, *[0.0] * 7]))


def test_bins_and_merging_of_unlike_histograms() -> None:
    for bins in (8, 70_000, True, 64.0):
        with pytest.raises(ConfigError, match=rf"bins={bins} must be a whole number in \[16, 65536\]"):
            Histogram.empty(bins)
    with pytest.raises(ConfigError, match="histograms of 64 and 32 bins can't be merged"):
        Histogram.empty(64).merged(Histogram.empty(32))
    with pytest.raises(CalibrationError, match="nothing was observed yet"):
        Histogram.empty().edges()


@pytest.mark.parametrize("name", SAMPLES)
def test_edges_span_the_range_and_hold_everything(name: str) -> None:
    x = SAMPLES[name]
    edges, counts = Histogram.empty().observe(x).edges()
    assert (edges[0].item(), edges[-1].item()) == (x.min().item(), x.max().item())
    assert counts.sum() == x.numel()
    assert torch.all(edges.diff() >= 0)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_numbers_at_the_ends_of_float32(scale: float) -> None:
    x = torch.linspace(-1, 1, 101) * scale
    edges, counts = Histogram.empty().observe(x).edges()
    assert counts.sum() == 101
    assert edges[-1] == x.max()
