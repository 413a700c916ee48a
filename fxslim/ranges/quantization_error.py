# SPDX-License-Identifier: Apache-2.0
"""The squared error of quantizing what a histogram holds: integrals, not samples."""

import torch
from torch import Tensor

# Candidates times bins or points that are looked at together: some 8 MiB a tensor.
_AT_ONCE = 1 << 20


class QuantizationError:
    """What grids of ``num_points`` points, ``first + k * step``, make of the values that bins hold.

    The values of a bin lie evenly between its edges; the integral over them is exact, whether a bin spans many points
    or none.

    >>> one, found = torch.ones(1), QuantizationError(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 3]), 2)
    >>> found.squared(first=one, step=one)
    tensor([0.2500], dtype=torch.float64)
    """

    def __init__(self, edges: Tensor, counts: Tensor, num_points: int) -> None:
        self.num_points = num_points
        self._at_once = max(1, _AT_ONCE // min(num_points, counts.numel()))
        # Around 0, so that no digits are lost where the data lies far away from it.
        self._centre = (edges[0] + edges[-1]).double() / 2
        kind = _Moments if num_points < counts.numel() else _Bins
        self._error = kind(edges.double() - self._centre, counts).error

    def squared(self, first: Tensor, step: Tensor) -> Tensor:
        """For each candidate grid, the sum of squared distances to its nearest point."""
        pairs = zip(
            *(part.split(self._at_once) for part in (first.double() - self._centre, step.double())), strict=True
        )
        return torch.cat([self._error(some[:, None], steps[:, None], self.num_points) for some, steps in pairs])


class _Moments:
    """How much lies below a point, and its mean times that: all that a sum over neighbouring points needs.

    With N and M those two at the middles between points, and ``last`` the last point, the squared distances sum to
    ``sum (x - last) ** 2 + 2 * step * sum (M - middle * N)``.
    """

    def __init__(self, edges: Tensor, counts: Tensor) -> None:
        lower, upper, width = edges[:-1], edges[1:], edges.diff()
        weights = counts.double()
        self.edges = edges
        self.density = torch.where(width > 0, weights / width, torch.zeros_like(weights))
        means = (torch.ones_like(weights), (lower + upper) / 2, (lower**2 + lower * upper + upper**2) / 3)
        self.totals = [(weights * mean).sum() for mean in means]
        # What is below a point x of bin k: offsets[k] + density[k] * x, and the same of the means with x**2 / 2.
        offsets = [
            torch.nn.functional.pad((weights * mean).cumsum(0)[:-1], (1, 0)) - self.density * lower**power / power
            for power, mean in enumerate(means[:2], 1)
        ]
        # Side by side: what belongs to a bin is fetched in one go.
        self.table = torch.stack([self.density, *offsets], 1)
        inner = width[1:-1]
        self.width = inner[0] if inner.numel() and bool((inner == inner[0]).all()) else None

    def error(self, first: Tensor, step: Tensor, num_points: int) -> Tensor:
        middles = first + step * (torch.arange(num_points - 1, dtype=torch.float64) + 0.5)
        inside = middles.clamp(self.edges[0], self.edges[-1])
        density, below, moment = torch.nn.functional.embedding(self._bins_of(inside), self.table).unbind(-1)
        below = below.addcmul(density, inside)
        moment = moment.addcmul(density, inside.square_(), value=0.5)
        last = first[:, 0] + step[:, 0] * (num_points - 1)
        whole = self.totals[2] - 2 * last * self.totals[1] + last**2 * self.totals[0]
        return whole + 2 * step[:, 0] * moment.addcmul_(middles, below, value=-1).sum(1)

    def _bins_of(self, points: Tensor) -> Tensor:
        if self.width is None:
            found = torch.searchsorted(self.edges, points, right=True) - 1
        else:
            # The first and the last bin may be narrower than the others, which lie evenly.
            found = ((points - self.edges[1]) / self.width + 1).floor_().long()
        return found.clamp_(0, self.density.numel() - 1)


class _Bins:
    """The integral within each bin: for grids of more points than there are bins."""

    def __init__(self, edges: Tensor, counts: Tensor) -> None:
        full = counts > 0
        self.lower, self.upper, self.weights = edges[:-1][full], edges[1:][full], counts[full].double()

    def error(self, first: Tensor, step: Tensor, num_points: int) -> Tensor:
        from_point, from_distance = _nearest(self.lower, first, step, num_points)
        to_point, to_distance = _nearest(self.upper, first, step, num_points)
        # Between two neighbouring points the squared distance integrates to step**3 / 12.
        cubes = (to_distance**3 - from_distance**3) / 3 + (to_point - from_point) * (step**3 / 12)
        width = self.upper - self.lower
        within = (from_distance**2 + from_distance * to_distance + to_distance**2) / 3
        # A bin of almost no width that spans the middle between two points has no digits left for a quotient.
        across = torch.where(width > 1e-6 * step, cubes / width, step**2 / 4)
        return torch.where(from_point == to_point, within, across) @ self.weights


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
