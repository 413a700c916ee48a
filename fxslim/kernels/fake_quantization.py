# SPDX-License-Identifier: Apache-2.0
"""fake_quantize: values rounded to an integer grid and back, gradients straight through inside it."""

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels.arguments import (
    as_parameter,
    check_axis,
    check_grid,
    check_input,
    check_positive,
    check_values,
    in_order,
    lies_channels_last,
    math_dtype,
)
from fxslim.kernels.clip_masks import pack_mask, register_masked_backward
from fxslim.kernels.quantization_grid import quantize_on_grid

torch.library.define(
    "fxslim::fake_quantize",
    "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis,"
    " bool channels_last, bool save_mask) -> (Tensor, Tensor)",
)


def _reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    channels_last: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    x = in_order(x, channels_last)
    y, kept = quantize_on_grid(x, scale, zero_point, quant_min, quant_max, axis, keep=save_mask)
    mask = x.new_empty(0, dtype=torch.uint8) if kept is None else pack_mask(kept, channels_last)
    return y, mask


torch.library.impl("fxslim::fake_quantize", "default", _reference)


@torch.library.register_fake("fxslim::fake_quantize")
def _fake(x, scale, zero_point, quant_min, quant_max, axis, channels_last, save_mask):  # type: ignore[no-untyped-def]
    size = (x.numel() + 7) // 8 if save_mask else 0
    return torch.empty_like(in_order(x, channels_last)), x.new_empty(size, dtype=torch.uint8)


register_masked_backward("fxslim::fake_quantize")


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    """Quantize x to the integer grid and back: ``(clamp(round(x / scale) + zero_point) - zero_point) * scale``.

    Ties round to even. ``scale`` and ``zero_point`` are one value, or one per channel along ``axis``.
    The gradient of x passes where nothing was clipped and is 0 elsewhere. NaN stays NaN (gradient 0);
    infinities saturate. The result lies in x's memory format where that is contiguous or channels last.

    >>> fake_quantize(torch.tensor([-1.0, 0.24, 0.26, 9.0]), 0.5, 0, -4, 3)
    tensor([-1.0000,  0.0000,  0.5000,  1.5000])
    """
    check_input(x)
    axis = check_axis(axis, x)
    check_grid(quant_min, quant_max)
    scales = as_parameter(scale, "scale", x, axis, math_dtype(x))
    zero_points = as_parameter(zero_point, "zero_point", x, axis, torch.int32)
    check_positive(scales, "scale")
    check_values(zero_points, "zero_point", quant_min, quant_max)
    if scales.requires_grad and torch.is_grad_enabled():
        raise ConfigError("scale requires grad, which fake_quantize does not give: use fake_quantize_learned")
    save_mask = torch.is_grad_enabled() and x.requires_grad
    return torch.ops.fxslim.fake_quantize(
        x, scales, zero_points, quant_min, quant_max, axis, lies_channels_last(x), save_mask
    )[0]
