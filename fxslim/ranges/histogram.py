# SPDX-License-Identifier: Apache-2.0
"""A running histogram of everything observed, which loses nothing when it is widened or merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels import observe_histogram, observe_min_max
from fxslim.ranges.bin_grid import grid_of_bins, moved_counts, numbers_of_grid
from fxslim.ranges.finite_data import are_finite, check_seen, num_not_finite


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts in bins whose width is a power of two and whose ends are multiples of it.

    Bin k spans ``[(start + k) * width, (start + k + 1) * width)``. ``width`` is the smallest at which
    the range fits, so at least about half of the bins lie inside it. Widening joins 2, 4, ... whole bins:
    counts stay whole numbers, and a histogram depends on the data alone, not on the order of batches, how
    they were split, or over how many ranks. All fields are tensors of fixed shape.

    >>> seen = Histogram.empty(16).observe(torch.tensor([0.1, 0.2, 0.9])).observe(torch.tensor([-1.0, 2.5]))
    >>> seen.low.item(), seen.high.item(), seen.width.item(), seen.counts.sum().item()
    (-1.0, 2.5, 0.25, 5)
    """

    counts: Tensor
    start: Tensor
    width: Tensor
    low: Tensor
    high: Tensor
    num_seen: Tensor
    num_bad: Tensor

    @classmethod
    def empty(cls, bins: int = 2048, device: torch.device | str = "cpu") -> Histogram:
        """Nothing seen yet: an infinite ``low`` says so."""
        if isinstance(bins, bool) or not isinstance(bins, int) or not 16 <= bins <= 65536:
            raise ConfigError(f"bins={bins!r} must be a whole number in [16, 65536]")
        zero = torch.zeros((), dtype=torch.float64, device=device)
        start, width = grid_of_bins(zero, zero, bins)
        return cls(
            counts=torch.zeros(bins, dtype=torch.int64, device=device),
            start=start,
            width=width,
            low=torch.full((), torch.inf, device=device),
            high=torch.full((), -torch.inf, device=device),
            num_seen=torch.zeros_like(start),
            num_bad=torch.zeros_like(start),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Histogram:
        """The histogram of which ``state`` gave the fields."""
        return cls(**{field.name: state[field.name] for field in fields(cls)})

    @property
    def bins(self) -> int:
        """How many there are."""
        return self.counts.numel()

    def state(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def observe(self, x: Tensor) -> Histogram:
        """The histogram that has seen x too.

        On the CPU this is one pass over x, and a second where x widens the range; elsewhere always two,
        and nothing waits for the device.
        """
        if x.numel() == 0:
            return self
        x = x.detach()
        seen = self.to(x.device)
        if x.device.type == "cpu" and seen.num_seen.item() > 0:
            start, width = seen.start.item(), seen.width.item()
            first, last = start * width, (start + seen.bins) * width
            counts, low, high = observe_histogram(x, first, last, seen.bins)
            if seen._spans(low, high):
                return replace(seen, counts=seen.counts + counts, num_seen=seen.num_seen + x.numel())
            if first <= low.item() and high.item() < last:
                return replace(seen, counts=seen.counts + counts, num_seen=seen.num_seen + x.numel())._over(low, high)
        else:
            low, high = observe_min_max(x)
        num_bad: Tensor | int = 0
        if not are_finite(low, high):
            num_bad = num_not_finite(x)
            if x.device.type == "cpu":
                check_seen(x.numel(), num_bad)
        grown = seen._over(low, high)
        counts, *_ = observe_histogram(x, *grown._ends(), seen.bins)
        return replace(
            grown,
            counts=grown.counts + counts,
            num_seen=seen.num_seen + x.numel(),
            num_bad=seen.num_bad + num_bad,
        )

    def merged(self, other: Histogram) -> Histogram:
        """The histogram that has seen what both have."""
        if self.bins != other.bins:
            raise ConfigError(f"histograms of {self.bins} and {other.bins} bins can't be merged; make both alike")
        mine = self._over(other.low, other.high)
        theirs = other.to(self.counts.device)._over(self.low, self.high)
        return replace(
            mine,
            counts=mine.counts + theirs.counts,
            num_seen=mine.num_seen + theirs.num_seen,
            num_bad=mine.num_bad + theirs.num_bad,
        )

    def to(self, device: torch.device) -> Histogram:
        """The same on another device."""
        if self.counts.device == device:
            return self
        return Histogram(**{name: value.to(device) for name, value in self.state().items()})

    def edges(self) -> tuple[Tensor, Tensor]:
        """On the CPU: ends (float64) of the bins that the range reaches, cut at its own ends; and their counts."""
        check_seen(self.num_seen, self.num_bad)
        first, last = (int(torch.floor(end.double() / self.width)) for end in (self.low, self.high))
        edges = torch.arange(first, last + 2, dtype=torch.float64) * self.width.cpu()
        edges[0], edges[-1] = self.low.cpu(), self.high.cpu()
        start = int(self.start)
        return edges, self.counts[first - start : last + 1 - start].cpu()

    def _ends(self) -> tuple[Tensor, Tensor]:
        return self.start * self.width, (self.start + self.bins) * self.width

    def _spans(self, low: Tensor, high: Tensor) -> bool:
        """Whether [low, high] is no news."""
        exact = torch.promote_types(self.low.dtype, low.dtype) == self.low.dtype
        return exact and self.low.item() <= low.item() and high.item() <= self.high.item()

    def _numbers(self) -> tuple[int, float]:
        return int(self.start.item()), self.width.item()

    def _over(self, low: Tensor, high: Tensor) -> Histogram:
        """The same counts on the grid of a range that holds [low, high] too."""
        dtype = torch.promote_types(self.low.dtype, low.dtype)
        low = torch.minimum(self.low.to(dtype), low.to(self.low.device, dtype))
        high = torch.maximum(self.high.to(dtype), high.to(self.high.device, dtype))
        if low.device.type == "cpu" and numbers_of_grid(low.item(), high.item(), self.bins) == self._numbers():
            return replace(self, low=low, high=high)
        start, width = grid_of_bins(low.double(), high.double(), self.bins)
        counts = moved_counts(self.counts, self.start, self.width, start, width)
        return replace(self, counts=counts, start=start, width=width, low=low, high=high)
