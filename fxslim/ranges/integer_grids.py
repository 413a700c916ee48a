# SPDX-License-Identifier: Apache-2.0
"""Grids of integers that cover ranges."""

import torch
from torch import Tensor


def integer_grid(clip_min: Tensor, clip_max: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """(first, step) of the grids that cover these ranges with 0 as one of their points.

    >>> integer_grid(torch.tensor([-1.0]), torch.tensor([2.0]), 4)
    (tensor([-1.]), tensor([1.]))
    """
    step = (clip_max - clip_min) / (num_points - 1)
    return torch.round(clip_min / step) * step, step
