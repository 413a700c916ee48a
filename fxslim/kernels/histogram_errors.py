# SPDX-License-Identifier: Apache-2.0
"""quantization_errors: what grids make of the values that a histogram holds. Integrals, not samples."""

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels.autograd_registration import without_gradient

torch.library.define(
    "fxslim::quantization_errors", "(Tensor edges, Tensor counts, Tensor first, Tensor step, int num_points) -> Tensor"
)

# Candidates times bins or points that are looked at together: some 8 MiB a tensor.
_AT_ONCE = 1 << 20


def _reference(edges: Tensor, counts: Tensor, first: Tensor, step: Tensor, num_points: int) -> Tensor:
    # Around 0, so that no digits are lost where the data lies far away from it.
    centre = (edges[0] + edges[-1]) / 2
    kind = _Moments if num_points < counts.numel() else _Bins
    error = kind(edges - centre, counts).error
    size = max(1, _AT_ONCE // min(num_points, counts.numel()))
    pairs = zip((first - centre).split(size), step.split(size), strict=True)
    return torch.cat([error(some[:, None], steps[:, None], num_points) for some, steps in pairs])


torch.library.impl("fxslim::quantization_errors", "default", _reference)


@torch.library.register_fake("fxslim::quantization_errors")
def _fake(edges, counts, first, step, num_points):  # type: ignore[no-untyped-def]
    return torch.empty_like(first, memory_format=torch.contiguous_format)


without_gradient("fxslim::quantization_errors")


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
        self.offsets = [
            torch.nn.functional.pad((weights * mean).cumsum(0)[:-1], (1, 0)) - self.density * lower**power / power
            for power, mean in enumerate(means[:2], 1)
        ]

    def error(self, first: Tensor, step: Tensor, num_points: int) -> Tensor:
        middles = first + step * (torch.arange(num_points - 1, dtype=first.dtype, device=first.device) + 0.5)
        inside = middles.clamp(self.edges[0], self.edges[-1])
        bins = (torch.searchsorted(self.edges, inside, right=True) - 1).clamp_(0, self.density.numel() - 1)
        below, moment = (offset[bins] for offset in self.offsets)
        density = self.density[bins]
        below, moment = below + density * inside, moment + density * inside**2 / 2
        last = first[:, 0] + step[:, 0] * (num_points - 1)
        whole = self.totals[2] - 2 * last * self.totals[1] + last**2 * self.totals[0]
        return whole + 2 * step[:, 0] * (moment - middles * below).sum(1)


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


def quantization_errors(edges: Tensor, counts: Tensor, first: Tensor, step: Tensor, num_points: int) -> Tensor:
    """For each grid of ``num_points`` points, ``first + k * step``: the sum of squared distances to its nearest point.

    The values of a bin lie evenly between its edges, of which there is one more than ``counts``, ascending; the
    integral over them is exact, whether a bin spans many points or none. In float64; nothing carries a gradient.

    >>> one = torch.ones(1)
    >>> quantization_errors(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 3]), first=one, step=one, num_points=2)
    tensor([0.2500], dtype=torch.float64)
    """
    if counts.dim() != 1 or not counts.numel() or edges.shape != (counts.numel() + 1,):
        raise ConfigError(
            f"edges of shape {tuple(edges.shape)} and counts of shape {tuple(counts.shape)}: one count for each bin, "
            "and one edge more"
        )
    if first.dim() != 1 or first.shape != step.shape:
        raise ConfigError(f"first of shape {tuple(first.shape)}, step of shape {tuple(step.shape)}: one of both a grid")
    if num_points < 1:
        raise ConfigError(f"num_points={num_points} must be at least 1")
    wide = (part.detach().double().contiguous() for part in (edges, first, step))
    edges, first, step = wide
    result: Tensor = torch.ops.fxslim.quantization_errors(edges, counts.long().contiguous(), first, step, num_points)
    return result
