# SPDX-License-Identifier: Apache-2.0
"""fake_quantize_clipped: an asymmetric grid between two learned clips (ULQ)."""

import torch
from torch import Tensor

from fxslim.kernels.arguments import (
    as_parameter,
    check_grid,
    check_input,
    check_values,
    in_order,
    lies_channels_last,
    math_dtype,
)
from fxslim.kernels.autograd_registration import register_autograd
from fxslim.kernels.no_double_backward import register_once_differentiable
from fxslim.kernels.quantization_grid import quantize_on_grid, usable_scale

torch.library.define(
    "fxslim::fake_quantize_clipped",
    "(Tensor x, Tensor clip_min, Tensor clip_max, int quant_min, int quant_max, bool channels_last)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fxslim::fake_quantize_clipped_backward",
    "(Tensor grad, Tensor x, Tensor clip_min, Tensor clip_max, int quant_min, int quant_max,"
    " bool channels_last) -> (Tensor, Tensor, Tensor)",
)


def _grid(clip_min: Tensor, clip_max: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    scale = usable_scale((clip_max - clip_min) / (quant_max - quant_min))
    zero_point = torch.nan_to_num(quant_min - torch.round(clip_min / scale), nan=float(quant_min))
    return scale, zero_point.clamp(quant_min, quant_max).to(torch.int32)


def _reference(x, clip_min, clip_max, quant_min, quant_max, channels_last):  # type: ignore[no-untyped-def]
    scale, zero_point = _grid(clip_min, clip_max, quant_min, quant_max)
    x = in_order(x, channels_last)
    y, _ = quantize_on_grid(x, scale, zero_point, quant_min, quant_max, axis=None, keep=False)
    return y, scale, zero_point


torch.library.impl("fxslim::fake_quantize_clipped", "default", _reference)


@torch.library.register_fake("fxslim::fake_quantize_clipped")
def _fake(x, clip_min, clip_max, quant_min, quant_max, channels_last):  # type: ignore[no-untyped-def]
    zero_point = torch.empty_like(clip_min, dtype=torch.int32)
    return torch.empty_like(in_order(x, channels_last)), torch.empty_like(clip_min), zero_point


def _backward_reference(grad, x, clip_min, clip_max, quant_min, quant_max, channels_last):  # type: ignore[no-untyped-def]
    dtype, steps = math_dtype(x), quant_max - quant_min
    low, high = clip_min.reshape(()), clip_max.reshape(())
    scale, zero_point = _grid(low, high, quant_min, quant_max)
    values, wide_grad = in_order(x, channels_last).to(dtype), in_order(grad, channels_last).to(dtype)
    above = values > scale * (quant_max - zero_point).to(dtype)
    below = values < scale * (quant_min - zero_point).to(dtype)
    zero, outside = torch.zeros((), dtype=dtype, device=x.device), above.logical_or(below)
    products = torch.where(outside, zero, wide_grad * _error(values, scale))
    error, over, under = (
        sums.sum(dtype=torch.float64)
        for sums in (products, torch.where(above, wide_grad, zero), torch.where(below, wide_grad, zero))
    )
    error = (error + over * _error(high, scale).double() + under * _error(low, scale).double()) / steps
    grad_x = torch.where(outside, zero, wide_grad).to(x.dtype)
    return grad_x, (under - error).to(dtype).reshape(1), (over + error).to(dtype).reshape(1)


def _error(values: Tensor, scale: Tensor) -> Tensor:
    """What rounding adds, in steps."""
    ends = values / scale
    return ends.round().sub_(ends)


torch.library.impl("fxslim::fake_quantize_clipped_backward", "default", _backward_reference)


@torch.library.register_fake("fxslim::fake_quantize_clipped_backward")
def _backward_fake(grad, x, clip_min, clip_max, quant_min, quant_max, channels_last):  # type: ignore[no-untyped-def]
    return torch.empty_like(in_order(x, channels_last)), torch.empty_like(clip_min), torch.empty_like(clip_max)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])
    ctx.grid, ctx.channels_last = inputs[3:5], inputs[5]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_):  # type: ignore[no-untyped-def]
    x, clip_min, clip_max = ctx.saved_tensors
    grads = torch.ops.fxslim.fake_quantize_clipped_backward(grad, x, clip_min, clip_max, *ctx.grid, ctx.channels_last)
    return *grads, None, None, None


register_autograd("fxslim::fake_quantize_clipped", _backward, setup_context=_setup)
register_once_differentiable("fake_quantize_clipped")


def fake_quantize_clipped(
    x: Tensor, clip_min: Tensor, clip_max: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fake-quantize x between two learned clips; returns (y, scale, zero_point), the last two without gradient.

    ``clip_min <= 0 <= clip_max`` hold one value each. With ``e`` the rounding error over the number of
    steps, the gradient of clip_max is the sum of ``grad * (e + above)``, that of clip_min the sum of
    ``grad * (below - e)``; x gets grad where it lies inside. Sums are made in float64.

    >>> y, scale, zero_point = fake_quantize_clipped(
    ...     torch.tensor([-1.5, 0.2, 3.5]), torch.tensor(-1.0), torch.tensor(3.0), -128, 127)
    >>> y, zero_point.item()
    (tensor([-1.0039,  0.2039,  2.9961]), -64)
    """
    check_input(x)
    check_grid(quant_min, quant_max)
    low = as_parameter(clip_min, "clip_min", x, None, math_dtype(x))
    high = as_parameter(clip_max, "clip_max", x, None, math_dtype(x))
    largest = torch.finfo(low.dtype).max
    check_values(low.detach(), "clip_min", -largest, 0)
    check_values(high.detach(), "clip_max", 0, largest)
    check_values((high - low).detach(), "clip_max - clip_min", torch.finfo(low.dtype).tiny, largest)
    outputs = torch.ops.fxslim.fake_quantize_clipped(x, low, high, quant_min, quant_max, lies_channels_last(x))
    return outputs[0], outputs[1], outputs[2]
