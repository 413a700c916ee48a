# SPDX-License-Identifier: Apache-2.0
"""Methods by name: options, states, ranks, devices, and what holds for every range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim import CalibrationError, ConfigError
from fxslim.ranges import range_method
from tests.ranges.samples import SAMPLES

NAMES = ["min_max", "moving_average", "percentile", "mse", "ifmr", "hfmg", "entropy"]
every_method = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("percentil", {}, "unknown range method 'percentil'; did you mean 'percentile'"),
        ("mse", {"axis": 0}, "unknown option of range method 'mse' 'axis'"),
        ("ifmr", {"search_rang": (1, 2)}, "did you mean 'search_range'"),
        ("percentile", {"percentile": 0.5}, r"percentile=0.5 must be a number in \(0.5, 1\]"),
        ("ifmr", {"max_percentile": 1.1}, "max_percentile=1.1 must be"),
        ("ifmr", {"min_percentile": True}, "min_percentile=True must be"),
        ("ifmr", {"search_range": (0.7,)}, "search_range=.* must be two numbers"),
        ("ifmr", {"search_range": (0.0, 1.0)}, "search_range=.* must increase, and start above 0"),
        ("ifmr", {"search_range": (1.3, 0.7)}, "search_range=.* must increase"),
        ("ifmr", {"search_step": 0}, r"search_step=0 must be in \(0, 0.6\]"),
        ("ifmr", {"search_step": 0.7}, r"search_step=0.7 must be in \(0, 0.6\]"),
        ("ifmr", {"search_step": "1"}, "search_step='1' must be a number"),
        ("hfmg", {"bins": 2000}, "bins=2000 must be one of 1024, 2048, 4096, 8192"),
        ("moving_average", {"averaging": 0}, r"averaging=0 must be a number in \(0, 1\]"),
        ("min_max", {"axis": "0"}, "axis='0' must be a whole number"),
    ],
)
def test_wrong_options_are_named(name, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        range_method(name, **options)


@every_method
@given(seed=st.integers(0, 10**6), shift=st.floats(-3, 3), symmetric=st.booleans())
def test_ranges_lie_within_the_data_and_0(name, seed, shift, symmetric) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) + shift
    method = range_method(name)
    method.observe(x)
    low, high = method.range(-128, 127, symmetric)
    assert low <= 0 <= high
    # IFMR tries ranges wider than the data, too.
    room = 1.3 if name == "ifmr" else 1.0
    least, most = (x.min().clamp(max=0) * room, x.max().clamp(min=0) * room)
    if symmetric:
        most = torch.maximum(most, -least) * (128 / 127)
        least = -most
    assert least * (1 + 1e-6) <= low
    assert high <= most * (1 + 1e-6)


@every_method
@given(exponent=st.integers(-20, 20), sample=st.sampled_from(["normal", "relu", "below 0"]), symmetric=st.booleans())
def test_scaled_data_scales_the_range(name, exponent, sample, symmetric) -> None:
    """By powers of two bit for bit: the same histogram, but for its unit."""
    ranges = []
    for scale in (1.0, 2.0**exponent):
        method = range_method(name)
        method.observe(SAMPLES[sample][:2_000] * scale)
        ranges.append(torch.stack(method.range(-8, 7, symmetric)) / scale)
    torch.testing.assert_close(*ranges, rtol=1e-6, atol=0)


@every_method
def test_state_goes_round_and_has_a_fixed_shape(name) -> None:
    method, other = range_method(name), range_method(name)
    shapes = {key: value.shape for key, value in method.state().items()}
    for batch in SAMPLES["normal"].split(3_000):
        method.observe(batch)
    assert {key: value.shape for key, value in method.state().items()} == shapes
    other.load_state({key: value.clone() for key, value in method.state().items()})
    for each in (method, other):
        each.observe(SAMPLES["outlier"])
    assert method.range(-128, 127) == other.range(-128, 127)


@every_method
def test_ranks_agree_with_one_that_saw_everything(name) -> None:
    parts = SAMPLES["normal"].split(5_000)
    ranks, alone = [range_method(name) for _ in parts], range_method(name)
    for rank, part in zip(ranks, parts, strict=True):
        rank.observe(part)
        alone.observe(part)
    for rank in ranks[1:]:
        ranks[0].merge(rank)
    if name == "moving_average":
        mean = torch.stack([part.min() for part in parts]).mean()
        torch.testing.assert_close(ranks[0].range(-128, 127)[0], mean)
    else:
        assert ranks[0].range(-128, 127) == alone.range(-128, 127)


@every_method
def test_nothing_zeros_and_empty_batches(name, device) -> None:
    method = range_method(name)
    with pytest.raises(CalibrationError, match="nothing was observed yet: run batches"):
        method.range(-128, 127)
    method.observe(torch.empty(0, 3, device=device))
    method.observe(torch.zeros(4, 3, device=device))
    for symmetric in (False, True):
        low, high = method.range(-128, 127, symmetric)
        assert (low.item(), high.item()) == (0.0, 0.0)
        assert low.device.type == device.type
    with pytest.raises(ConfigError, match="quant_min=7 must be below quant_max=-8"):
        method.range(7, -8)


@every_method
def test_data_that_is_not_finite_is_refused(name, device) -> None:
    method = range_method(name)
    x = torch.ones(10, device=device)
    x[3], x[5] = torch.nan, torch.inf
    with pytest.raises(CalibrationError, match="2 of 10 observed entries are NaN or infinite"):  # noqa: PT012
        method.observe(x)
        method.range(-128, 127)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(name, dtype, device) -> None:
    x = torch.randn(2, 6, 9, 9).to(dtype)
    method, double = range_method(name), range_method(name)
    method.observe(x.contiguous(memory_format=torch.channels_last).to(device))
    double.observe(x.double())
    low, high = method.range(-128, 127)
    assert low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.stack(double.range(-128, 127))
    torch.testing.assert_close(torch.stack([low, high]).double().cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["min_max", "moving_average"])
def test_per_channel(name) -> None:
    x = torch.randn(4, 3, 5)
    method = range_method(name, axis=1)
    method.observe(x)
    low, high = method.range(-128, 127)
    assert torch.equal(low, x.amin((0, 2)).clamp(max=0))
    assert torch.equal(high, x.amax((0, 2)).clamp(min=0))
    with pytest.raises(ConfigError, match=r"2 channels along axis 1 of \(4, 2, 5\), 3 before"):
        method.observe(x[:, :2])


@pytest.mark.parametrize("low, high, scale", [(-0.5, 1.0, 1 / 127), (-1.0, 0.5, 1 / 128)], ids=str)
def test_symmetric_scales_of_amct(low, high, scale) -> None:
    method = range_method("min_max")
    method.observe(torch.tensor([low, high]))
    clips = method.range(-128, 127, symmetric=True)
    assert [end.item() for end in clips] == pytest.approx([-128 * scale, 127 * scale], rel=1e-6)
