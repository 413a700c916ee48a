# SPDX-License-Identifier: Apache-2.0
"""All but a few of the largest and smallest values."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.ranges.extreme_values import NUM_KEPT, largest_with, no_values, smallest_with
from fxslim.ranges.method import HistogramMethod
from fxslim.ranges.symmetric_ranges import range_with_zero


def check_percentile(name: str, value: float) -> None:
    """Raise unless it lies in (0.5, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 < value <= 1.0:
        raise ConfigError(f"{name}={value!r} must be a number in (0.5, 1]; 1 keeps everything")


def quantile_of(edges: Tensor, counts: Tensor, rank: int) -> Tensor:
    """The value below which so many of the counts lie, evenly spread inside each bin.

    >>> quantile_of(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([4, 4]), rank=6)
    tensor(1.5000)
    """
    below = counts.cumsum(0)
    k = min(int(torch.searchsorted(below, rank)), counts.numel() - 1)
    inside = 1.0 - (below[k] - rank) / counts[k].clamp(min=1)
    return edges[k] + (edges[k + 1] - edges[k]) * inside.to(edges.dtype)


class Percentile(HistogramMethod):
    """The k-th largest and k-th smallest value, k = N - int(percentile * N) of N, at least 1.

    Exact while k <= 128, else read off the histogram.

    >>> method = Percentile(percentile=0.75)
    >>> method.observe(torch.arange(-10.0, 10.0))
    >>> method.range(-128, 127)
    (tensor(-6.), tensor(5.))
    """

    name: ClassVar[str] = "percentile"

    def __init__(
        self,
        *,
        percentile: float = 0.999999,
        max_percentile: float | None = None,
        min_percentile: float | None = None,
        bins: int = 2048,
    ) -> None:
        super().__init__(bins)
        self.max_percentile = percentile if max_percentile is None else max_percentile
        self.min_percentile = percentile if min_percentile is None else min_percentile
        check_percentile("percentile", percentile)
        check_percentile("max_percentile", self.max_percentile)
        check_percentile("min_percentile", self.min_percentile)
        self.largest, self.smallest = no_values(), -no_values()

    def observe(self, x: Tensor) -> None:
        """A pass for the histogram, and one for either end."""
        super().observe(x)
        if x.numel() > 0:
            self.largest = largest_with(self.largest.to(x.device), x)
            self.smallest = smallest_with(self.smallest.to(x.device), x)

    def state(self) -> dict[str, Tensor]:
        """The histogram's fields, and the largest and smallest values."""
        return {**super().state(), "largest": self.largest, "smallest": self.smallest}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from these."""
        super().load_state(state)
        self.largest, self.smallest = state["largest"], state["smallest"]

    def merge(self, other: Self) -> None:
        """Add the other's histogram and values."""
        super().merge(other)
        device = self.largest.device
        self.largest = largest_with(self.largest, other.largest.to(device))
        self.smallest = smallest_with(self.smallest, other.smallest.to(device))

    def ends(self) -> tuple[Tensor, Tensor]:
        """The k-th smallest and k-th largest value, as float64 on the CPU."""
        edges, counts = self.histogram.edges()
        total = int(counts.sum())
        low, high = (max(1, total - int(p * total)) for p in (self.min_percentile, self.max_percentile))
        clip_min = self.smallest[low - 1].cpu() if low <= NUM_KEPT else quantile_of(edges, counts, low)
        clip_max = self.largest[high - 1].cpu() if high <= NUM_KEPT else quantile_of(edges, counts, total - high)
        return clip_min.double(), clip_max.double()

    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        return self._as_clips(*range_with_zero(*self.ends(), quant_min, quant_max, symmetric))
