# SPDX-License-Identifier: Apache-2.0
"""Where bins lie: widths are powers of two, ends multiples of them. All on the device of the data, unwaited for."""

import math

import torch
from torch import Tensor

# No bin is narrower than this, nor than 2**-20 of the largest magnitude: its ends stay exact in float32.
_NARROWEST, _FINEST = 2.0**-100, 2.0**-20


def _power_above(value: Tensor) -> Tensor:
    """The smallest power of two above a number > 0, exactly; 0 for 0."""
    mantissa, _ = torch.frexp(value)
    return torch.where(mantissa > 0, value / mantissa, torch.zeros_like(value))


def grid_of_bins(low: Tensor, high: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """(start, width): bin k spans [(start + k) * width, (start + k + 1) * width), and [low, high] fits.

    The width is the smallest power of two at which it does; what is left over is shared by both sides.

    >>> ends = torch.tensor([-1.0, 2.5], dtype=torch.float64)
    >>> grid_of_bins(*ends, bins=16)
    (tensor(-4), tensor(0.2500, dtype=torch.float64))
    """
    if low.device.type == "cpu" and not torch.compiler.is_compiling():
        first, step = numbers_of_grid(low.item(), high.item(), bins)
        return torch.tensor(first), torch.tensor(step, dtype=torch.float64)
    low, high = (torch.nan_to_num(end, nan=0.0, posinf=0.0, neginf=0.0) for end in (low, high))
    # Halves, since the whole may be too large for a number.
    span = _power_above(high / 2 - low / 2) * 2
    least = torch.clamp(_power_above(torch.maximum(low.abs(), high.abs())) * _FINEST, min=_NARROWEST)
    width = torch.maximum(span * 2.0 ** (2 - bins.bit_length()), least)
    for narrower in range(3):
        tried = torch.maximum(span * 2.0 ** (1 - narrower - bins.bit_length()), least)
        width = torch.where(_num_reached(low, high, tried) <= bins, tried, width)
    spare = bins - _num_reached(low, high, width)
    return torch.floor(low / width).to(torch.int64) - spare // 2, width


def numbers_of_grid(low: float, high: float, bins: int) -> tuple[int, float]:
    """The same on plain numbers, many times as fast as on tensors of one."""
    low, high = (end if math.isfinite(end) else 0.0 for end in (low, high))
    span = _number_above(high / 2 - low / 2) * 2
    least = max(_number_above(max(abs(low), abs(high))) * _FINEST, _NARROWEST)

    def reached(width: float) -> int:
        return math.floor(high / width) - math.floor(low / width) + 1

    width = max(span * 2.0 ** (2 - bins.bit_length()), least)
    for narrower in range(3):
        tried = max(span * 2.0 ** (1 - narrower - bins.bit_length()), least)
        width = tried if reached(tried) <= bins else width
    return math.floor(low / width) - (bins - reached(width)) // 2, width


def _number_above(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent) if mantissa > 0 else 0.0


def _num_reached(low: Tensor, high: Tensor, width: Tensor) -> Tensor:
    return (torch.floor(high / width) - torch.floor(low / width) + 1).to(torch.int64)


def moved_counts(counts: Tensor, start: Tensor, width: Tensor, new_start: Tensor, new_width: Tensor) -> Tensor:
    """Counts of bins, in bins as wide or 2, 4, ... times as wide: whole bins are joined.

    >>> numbers = [torch.tensor(number) for number in (3, 1.0, 0, 4.0)]
    >>> moved_counts(torch.tensor([1, 2, 3]), *numbers)
    tensor([1, 5, 0])
    """
    bins = counts.numel()
    positions = start + torch.arange(bins, device=counts.device)
    joined = torch.floor(positions.double() * (width / new_width)).to(torch.int64) - new_start
    # Empty bins may lie outside of the new grid.
    return torch.zeros_like(counts).index_add_(0, joined.clamp_(0, bins - 1), counts)
