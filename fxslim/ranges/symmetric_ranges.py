# SPDX-License-Identifier: Apache-2.0
"""Ranges of symmetric grids: both ends follow from one scale."""

import torch
from torch import Tensor

from fxslim.kernels.arguments import check_grid, check_symmetric, middle_of_grid


def check_grid_of(quant_min: int, quant_max: int, symmetric: bool) -> None:
    """Raise unless these are the ends of a grid, with steps on both sides if it is symmetric."""
    check_grid(quant_min, quant_max)
    if symmetric:
        check_symmetric(quant_min, quant_max)


def symmetric_scale(low: Tensor, high: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The smallest scale that clips neither end: 128 steps of int8 lie below 0, 127 above.

    >>> symmetric_scale(torch.tensor(-1.0), torch.tensor(0.5), -128, 127).item()
    0.0078125
    """
    middle = middle_of_grid(quant_min, quant_max)
    return torch.maximum(high / (quant_max - middle), low / (quant_min - middle))


def symmetric_ends(scale: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """The range of a symmetric grid.

    >>> symmetric_ends(torch.tensor(0.5), -128, 127)
    (tensor(-64.), tensor(63.5000))
    """
    middle = middle_of_grid(quant_min, quant_max)
    # Adding 0 turns -0.0 into 0.0.
    return scale * (quant_min - middle) + 0.0, scale * (quant_max - middle)


def range_with_zero(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """[low, high], widened to hold 0; or the smallest symmetric range that holds it."""
    low, high = low.clamp(max=0) + 0.0, high.clamp(min=0) + 0.0
    if not symmetric:
        return low, high
    return symmetric_ends(symmetric_scale(low, high, quant_min, quant_max), quant_min, quant_max)
