# SPDX-License-Identifier: Apache-2.0
"""The squared error of quantizing what a histogram holds: integrals, not samples."""

import torch
from torch import Tensor

# Candidates times bins that are looked at together: some 8 MiB a tensor.
_AT_ONCE = 1 << 20


def squared_error(edges: Tensor, counts: Tensor, first: Tensor, step: Tensor, num_points: int) -> Tensor:
    """For each candidate grid, the sum of squared distances to its nearest point.

    A grid has ``num_points`` points, ``first + k * step``. The values of a bin lie evenly between its
    edges. The integral over a bin is exact, also where a bin spans many points, or none.

    >>> edges, one = torch.tensor([0.0, 1.0, 2.0]), torch.ones(1)
    >>> squared_error(edges, torch.tensor([0, 3]), first=one, step=one, num_points=2)
    tensor([0.2500], dtype=torch.float64)
    """
    edges, weights = edges.double(), counts.double()
    if not edges.numel():
        return torch.zeros_like(first)
    full = weights > 0
    lower, upper, weights = edges[:-1][full], edges[1:][full], weights[full]
    size = max(1, _AT_ONCE // max(1, weights.numel()))
    parts = [
        _mean_errors(lower, upper, *pair, num_points) @ weights
        for pair in zip(first.double().split(size), step.double().split(size), strict=True)
    ]
    return torch.cat(parts)


def _mean_errors(lower: Tensor, upper: Tensor, first: Tensor, step: Tensor, num_points: int) -> Tensor:
    """[candidate, bin]: the mean squared distance within each bin."""
    step = step[:, None]
    from_point, from_distance = _nearest(lower, first[:, None], step, num_points)
    to_point, to_distance = _nearest(upper, first[:, None], step, num_points)
    # Between two neighbouring points the squared distance integrates to step**3 / 12.
    cubes = (to_distance**3 - from_distance**3) / 3 + (to_point - from_point) * (step**3 / 12)
    width = upper - lower
    within = (from_distance**2 + from_distance * to_distance + to_distance**2) / 3
    # A bin of almost no width that spans the middle between two points has no digits left for a quotient.
    across = torch.where(width > 1e-6 * step, cubes / width, step**2 / 4)
    return torch.where(from_point == to_point, within, across)


def _nearest(x: Tensor, first: Tensor, step: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    point = ((x - first) / step).round_().clamp_(0, num_points - 1)
    return point, x - first - point * step


def integer_grid(clip_min: Tensor, clip_max: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """(first, step) of the grids that cover these ranges with 0 as one of their points.

    >>> integer_grid(torch.tensor([-1.0]), torch.tensor([2.0]), 4)
    (tensor([-1.]), tensor([1.]))
    """
    step = (clip_max - clip_min) / (num_points - 1)
    return torch.round(clip_min / step) * step, step
