# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of integer grids, shared by the references: round half to even of x / scale, plus zero
point, clamped. NaN stays NaN; infinities saturate; an unusable scale gives NaN.
"""

import torch
from torch import Tensor

from fxslim.kernels.arguments import math_dtype, middle_of_grid


def along_axis(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A vector of parameters shaped to broadcast along one axis of x."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = values.numel()
    return values.reshape(shape)


def usable_scale(scale: Tensor) -> Tensor:
    """NaN in place of what is not a finite positive number."""
    usable = (scale > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, torch.full_like(scale, float("nan")))


def quantize_on_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """x on the grid, in x's dtype and layout; and, if asked, a bool tensor: True where nothing was clipped."""
    dtype = math_dtype(x)
    scale = along_axis(usable_scale(scale), x, axis)
    zero_point = along_axis(zero_point, x, axis).to(dtype)
    steps = torch.div(x.to(dtype), scale).round_()
    low, high = quant_min - zero_point, quant_max - zero_point
    kept = torch.ge(steps, low).logical_and_(torch.le(steps, high)) if keep else None
    if axis is None:
        steps.clamp_(low.item(), high.item())
    else:
        torch.clamp(steps, low, high, out=steps)
    # Adding zero turns -0.0 into 0.0, as the sum with a zero point does.
    return steps.add_(0.0).mul_(scale).to(x.dtype), kept


def grid_from_range(
    range_min: Tensor, range_max: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover a range, which is widened to hold 0.

    Symmetric grids put 0 in the middle and take the smallest scale that clips neither end (127 steps for
    the positive side of int8, 128 for the negative one). A range of nothing gets scale 1. A range that is
    not finite gets scale NaN.
    """
    low, high = range_min.clamp(max=0), range_max.clamp(min=0)
    if symmetric:
        middle = middle_of_grid(quant_min, quant_max)
        scale = torch.maximum(high / (quant_max - middle), low / (quant_min - middle))
        zero_point = torch.full_like(scale, middle)
    else:
        scale = (high - low) / (quant_max - quant_min)
        zero_point = quant_min - torch.round(low / scale)
    empty = scale < torch.finfo(scale.dtype).tiny
    scale = torch.where(empty, torch.ones_like(scale), usable_scale(scale))
    at_zero = 0 if quant_min <= 0 <= quant_max else quant_min
    if not symmetric:
        zero_point = torch.where(empty, torch.full_like(zero_point, at_zero), zero_point)
    usable = torch.nan_to_num(zero_point, nan=float(at_zero)).clamp(quant_min, quant_max)
    return scale, usable.to(torch.int32)
