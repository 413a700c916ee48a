# SPDX-License-Identifier: Apache-2.0
"""fake_quantize_float: values rounded to a small floating-point format (fp8, fp6, fp4) and back."""

from typing import NamedTuple

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError, unknown_name
from fxslim.kernels.arguments import (
    as_parameter,
    check_axis,
    check_input,
    check_positive,
    in_order,
    lies_channels_last,
    math_dtype,
)
from fxslim.kernels.clip_masks import pack_mask, register_masked_backward
from fxslim.kernels.quantization_grid import along_axis, usable_scale

# Any format with 1 to 10 mantissa bits, subnormals below 2 ** least_exponent, and `largest` one of its values.
torch.library.define(
    "fxslim::fake_quantize_float",
    "(Tensor x, Tensor scale, int mantissa_bits, int least_exponent, float largest, int? axis,"
    " bool channels_last, bool save_mask) -> (Tensor, Tensor)",
)


class FloatFormat(NamedTuple):
    """The values of a format: ``mantissa * 2 ** exponent`` up to the largest finite one."""

    mantissa_bits: int
    least_exponent: int
    largest: float


FORMATS = {
    "fp8_e4m3": FloatFormat(mantissa_bits=3, least_exponent=-6, largest=448.0),
    "fp8_e5m2": FloatFormat(mantissa_bits=2, least_exponent=-14, largest=57344.0),
    "fp6_e3m2": FloatFormat(mantissa_bits=2, least_exponent=-2, largest=28.0),
    "fp6_e2m3": FloatFormat(mantissa_bits=3, least_exponent=0, largest=7.5),
    "fp4_e2m1": FloatFormat(mantissa_bits=1, least_exponent=0, largest=6.0),
}
_EXPONENT_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def _power_below(values: Tensor) -> Tensor:
    """The largest power of two that is not above each magnitude: the exponent's bits alone (0 for subnormals)."""
    integers, exponent = _EXPONENT_BITS[values.dtype]
    return values.view(integers).bitwise_and(exponent).view(values.dtype)


def _reference(
    x: Tensor,
    scale: Tensor,
    mantissa_bits: int,
    least_exponent: int,
    largest: float,
    axis: int | None,
    channels_last: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    x = in_order(x, channels_last)
    scale = along_axis(usable_scale(scale), x, axis)
    # Twice the largest value is still seen as clipped, and its step is finite.
    values = torch.div(x.to(math_dtype(x)), scale).clamp_(-2 * largest, 2 * largest)
    step = _power_below(values).clamp_(min=2.0**least_exponent).mul_(2.0**-mantissa_bits)
    values.div_(step).round_().mul_(step)
    kept = torch.le(values.abs(), largest) if save_mask else None
    # Adding zero turns -0.0 into 0.0, as fake_quantize does.
    y = values.clamp_(-largest, largest).add_(0.0).mul_(scale).to(x.dtype)
    mask = x.new_empty(0, dtype=torch.uint8) if kept is None else pack_mask(kept, channels_last)
    return y, mask


torch.library.impl("fxslim::fake_quantize_float", "default", _reference)


@torch.library.register_fake("fxslim::fake_quantize_float")
def _fake(x, scale, mantissa_bits, least_exponent, largest, axis, channels_last, save_mask):  # type: ignore[no-untyped-def]
    size = (x.numel() + 7) // 8 if save_mask else 0
    return torch.empty_like(in_order(x, channels_last)), x.new_empty(size, dtype=torch.uint8)


register_masked_backward("fxslim::fake_quantize_float")


def fake_quantize_float(x: Tensor, scale: Tensor | float, format: str, axis: int | None = None) -> Tensor:
    """Round ``x / scale`` to the nearest value of a small floating-point format, times ``scale``.

    Formats: ``fp8_e4m3``, ``fp8_e5m2``, ``fp6_e3m2``, ``fp6_e2m3``, ``fp4_e2m1``; ties go to the even
    mantissa, subnormals are values like any other, what is too large saturates. ``scale`` is one value, or
    one per channel along ``axis``. The gradient of x passes where the rounded value is not beyond the
    format's largest and is 0 elsewhere. NaN stays NaN (gradient 0); infinities saturate.

    >>> fake_quantize_float(torch.tensor([-9.0, 0.2, 0.3, 2.5]), 1.0, "fp4_e2m1")
    tensor([-6.0000,  0.0000,  0.5000,  2.0000])
    """
    check_input(x)
    axis = check_axis(axis, x)
    if not isinstance(format, str):
        raise DtypeError(f"format must be a name, got {format!r}")
    if format not in FORMATS:
        raise ConfigError(unknown_name("format", format, FORMATS))
    scales = as_parameter(scale, "scale", x, axis, math_dtype(x))
    check_positive(scales, "scale")
    if scales.requires_grad and torch.is_grad_enabled():
        raise ConfigError("scale requires grad, which fake_quantize_float does not give: pass scale.detach()")
    save_mask = torch.is_grad_enabled() and x.requires_grad
    return torch.ops.fxslim.fake_quantize_float(x, scales, *FORMATS[format], axis, lies_channels_last(x), save_mask)[0]
