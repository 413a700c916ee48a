# SPDX-License-Identifier: Apache-2.0
"""fake_quantize_float against a table of each format's values, made from its bit codes, and against torch's fp8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxslim import kernels
from fxslim.kernels.float_fake_quantization import FORMATS

# Bits of the mantissa, bias of the exponent, code of the largest finite value.
CODES = {
    "fp8_e4m3": (3, 7, 0x7E),
    "fp8_e5m2": (2, 15, 0x7B),
    "fp6_e3m2": (2, 3, 0x1F),
    "fp6_e2m3": (3, 1, 0x1F),
    "fp4_e2m1": (1, 1, 0x07),
}
TORCH = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
every_format = pytest.mark.parametrize("form", CODES)
every_torch_format = pytest.mark.parametrize("form", TORCH)


def decode(code: int, mantissa_bits: int, bias: int) -> float:
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if exponent == 0:
        return mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
    return (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def positive_values(form: str) -> Tensor:
    """Index = bit code, up to the code after the largest finite one, which stands for all that is clipped."""
    mantissa_bits, bias, last = CODES[form]
    return torch.tensor([decode(code, mantissa_bits, bias) for code in range(last + 2)], dtype=torch.float64)


def nearest(v: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The nearest value of each v, ties to the even code; and where nothing was clipped."""
    table = positive_values(form)
    middles = (table[1:] + table[:-1]) / 2
    wide = v.double().abs()
    codes = torch.searchsorted(middles, wide)
    on_middle = (codes < len(middles)) & (middles[codes.clamp(max=len(middles) - 1)] == wide)
    codes = codes + (on_middle & (codes % 2 == 1)).long()
    kept = codes <= CODES[form][2]
    return table[codes.clamp(max=CODES[form][2])] * v.double().sign() + 0.0, kept


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def around_the_table(form: str, dtype: torch.dtype) -> Tensor:
    """Every value and every middle between two, and their neighbours in dtype, both signs; tiny and huge numbers."""
    table = positive_values(form)
    points = torch.cat([table, (table[1:] + table[:-1]) / 2]).to(dtype)
    up, down = (torch.nextafter(points, torch.tensor(end, dtype=dtype)) for end in (torch.inf, -torch.inf))
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 4], dtype=dtype)
    points = torch.cat([points, up, down, ends])
    return torch.cat([points, -points])


def assert_follows_the_table(x: Tensor, scale: float, form: str, device: str) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.tensor(scale, dtype=dtype)
    want, kept = nearest(x.to(dtype) / s, form)
    x = x.detach().to(device).requires_grad_()
    y = kernels.fake_quantize_float(x, scale, form)
    assert torch.equal(y.detach().cpu(), (want.to(dtype) * s).to(x.dtype))
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad.cpu() == 1, kept)


@every_format
def test_the_format_holds_the_values_of_its_codes(form: str) -> None:
    mantissa_bits, bias, last = CODES[form]
    assert FORMATS[form] == (mantissa_bits, 1 - bias, positive_values(form)[last].item())


@every_format
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9, 3e-5])
def test_every_16_bit_number(form: str, scale: float, device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert_follows_the_table(every_value(dtype), scale, form, device)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neighbours_of_all_values_and_middles(form: str, dtype: torch.dtype, device) -> None:
    x = around_the_table(form, dtype)
    assert_follows_the_table(x, 1.0, form, device)
    assert_follows_the_table(x, 0.37, form, device)


@every_torch_format
def test_equals_the_cast_of_torch_on_many_float32(form: str) -> None:
    """Every 4099th of all bit patterns, and those of 16 bits widened."""
    x = torch.arange(-(2**31), 2**31, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([x, every_value(torch.float16).float(), every_value(torch.bfloat16).float()])
    largest = FORMATS[form].largest
    want = x.clamp(-largest, largest).to(TORCH[form]).float() + 0.0
    torch.testing.assert_close(kernels.fake_quantize_float(x, 1.0, form), want, rtol=0, atol=0, equal_nan=True)


@every_torch_format
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1), exponent=st.integers(-20, 20))
def test_equals_the_cast_of_torch_with_a_power_of_two_as_scale(form: str, values, exponent: int) -> None:
    x, largest = torch.tensor(values, dtype=torch.float32), FORMATS[form].largest
    want = (x / 2.0**exponent).clamp(-largest, largest).to(TORCH[form]).float() * 2.0**exponent
    assert torch.equal(kernels.fake_quantize_float(x, 2.0**exponent, form), want)


def test_any_small_format_by_its_numbers() -> None:
    """float16 itself, and the fp8 with one zero."""
    x = torch.arange(-(2**31), 2**31, 40_009, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    for numbers, dtype in (((10, -14, 65504.0), torch.float16), ((3, -7, 240.0), torch.float8_e4m3fnuz)):
        y, _ = torch.ops.fxslim.fake_quantize_float(x, torch.ones(1), *numbers, None, False, False)
        assert torch.equal(y, x.clamp(-numbers[2], numbers[2]).to(dtype).float())


def test_float64_is_rounded_once() -> None:
    """Through float32 this would fall on the middle of 1 and 1.125, and to the even one."""
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)
    assert kernels.fake_quantize_float(x, 1.0, "fp8_e4m3").item() == 1.125
    assert kernels.fake_quantize_float(x.float(), 1.0, "fp8_e4m3").item() == 1.0


@every_format
@given(values=st.lists(st.floats(-1e4, 1e4), min_size=1), scale=st.floats(1e-3, 10.0), data=st.data())
def test_idempotent_odd_and_monotone(form: str, values, scale: float, data) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    x = torch.tensor(values, dtype=torch.float64).to(dtype).sort().values
    y = kernels.fake_quantize_float(x, scale, form)
    assert torch.equal(kernels.fake_quantize_float(y, scale, form), y)
    assert torch.equal(kernels.fake_quantize_float(-x, scale, form), -y)
    assert torch.all(y.diff() >= 0)


@every_format
def test_nan_infinity_and_zero(form: str, device) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, -1e-30], device=device, requires_grad=True)
    y = kernels.fake_quantize_float(x, 0.5, form)
    y.backward(torch.ones_like(y))
    largest = FORMATS[form].largest / 2
    assert y[0].isnan()
    assert y[1:].tolist() == [largest, -largest, 0.0, 0.0]
    assert not torch.signbit(y[3:]).any()
    assert x.grad.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_scale_that_is_not_looked_at_gives_nan(scale: float, device) -> None:
    x, scales = torch.randn(50, device=device), torch.tensor([scale], device=device)
    y, mask = torch.ops.fxslim.fake_quantize_float(x, scales, *FORMATS["fp4_e2m1"], None, False, True)
    assert y.isnan().all()
    assert not mask.any()
