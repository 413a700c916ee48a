# SPDX-License-Identifier: Apache-2.0
"""fake_quantize_learned: a grid whose scale is a parameter (LSQ)."""

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
from fxslim.kernels.autograd_registration import register_autograd
from fxslim.kernels.no_double_backward import register_once_differentiable
from fxslim.kernels.quantization_grid import along_axis, quantize_on_grid, usable_scale

torch.library.define(
    "fxslim::fake_quantize_learned",
    "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, float? grad_factor,"
    " int? axis, bool channels_last) -> Tensor",
)
torch.library.define(
    "fxslim::fake_quantize_learned_backward",
    "(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max,"
    " float? grad_factor, int? axis, bool channels_last) -> (Tensor, Tensor)",
)


def _reference(x, scale, zero_point, quant_min, quant_max, grad_factor, axis, channels_last):  # type: ignore[no-untyped-def]
    x = in_order(x, channels_last)
    return quantize_on_grid(x, scale, zero_point, quant_min, quant_max, axis, keep=False)[0]


torch.library.impl("fxslim::fake_quantize_learned", "default", _reference)


@torch.library.register_fake("fxslim::fake_quantize_learned")
def _fake(x, scale, zero_point, quant_min, quant_max, grad_factor, axis, channels_last):  # type: ignore[no-untyped-def]
    return torch.empty_like(in_order(x, channels_last))


def _backward_reference(grad, x, scale, zero_point, quant_min, quant_max, grad_factor, axis, channels_last):  # type: ignore[no-untyped-def]
    if grad_factor is None:
        grad_factor = (max(x.numel() / max(scale.numel(), 1), 1.0) * max(abs(quant_max), 1)) ** -0.5
    dtype = math_dtype(x)
    values, wide_grad = in_order(x, channels_last).to(dtype), in_order(grad, channels_last).to(dtype)
    zero_points = along_axis(zero_point, x, axis).to(dtype)
    low, high = quant_min - zero_points, quant_max - zero_points
    values = values / along_axis(usable_scale(scale), x, axis)
    steps = values.round()
    below, above = steps < low, steps > high
    slope = torch.where(below, low, torch.where(above, high, steps - values))
    others = list(range(x.dim())) if axis is None else [d for d in range(x.dim()) if d != axis]
    products = (wide_grad * slope).to(torch.float64)
    sums = (products.sum(others) if others else products) * grad_factor
    kept = torch.ge(steps, low).logical_and_(torch.le(steps, high))
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return torch.where(kept, in_order(grad, channels_last), zero).to(x.dtype), sums.to(dtype).reshape(-1)


torch.library.impl("fxslim::fake_quantize_learned_backward", "default", _backward_reference)


@torch.library.register_fake("fxslim::fake_quantize_learned_backward")
def _backward_fake(grad, x, scale, zero_point, quant_min, quant_max, grad_factor, axis, channels_last):  # type: ignore[no-untyped-def]
    return torch.empty_like(in_order(x, channels_last)), torch.empty_like(scale)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    grads = torch.ops.fxslim.fake_quantize_learned_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *grads, *[None] * 6


register_autograd("fxslim::fake_quantize_learned", _backward, setup_context=_setup)
register_once_differentiable("fake_quantize_learned")


def fake_quantize_learned(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    *,
    grad_factor: float | None = None,
) -> Tensor:
    """``fake_quantize`` whose scale gets a gradient, so that it can be trained.

    Per element the slope of the scale is ``round(x / scale) - x / scale`` inside the grid, and the
    clipping end (in steps from the zero point) outside; their sum with grad is made in float64 and
    multiplied by ``grad_factor``: by default LSQ's ``1 / sqrt(elements per scale * quant_max)``.

    >>> scale = torch.tensor(0.5, requires_grad=True)
    >>> fake_quantize_learned(torch.tensor([0.6, 9.0]), scale, 0, -4, 3, grad_factor=1.0).sum().backward()
    >>> scale.grad
    tensor(2.8000)
    """
    check_input(x)
    axis = check_axis(axis, x)
    check_grid(quant_min, quant_max)
    scales = as_parameter(scale, "scale", x, axis, math_dtype(x))
    zero_points = as_parameter(zero_point, "zero_point", x, axis, torch.int32)
    check_positive(scales.detach(), "scale")
    check_values(zero_points, "zero_point", quant_min, quant_max)
    if grad_factor is not None and not 0.0 < grad_factor < float("inf"):
        raise ConfigError(f"grad_factor={grad_factor} must be a finite number > 0")
    return torch.ops.fxslim.fake_quantize_learned(
        x, scales, zero_points, quant_min, quant_max, grad_factor, axis, lies_channels_last(x)
    )
