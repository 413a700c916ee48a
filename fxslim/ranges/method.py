# SPDX-License-Identifier: Apache-2.0
"""What every method of choosing a range offers."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from torch import Tensor

from fxslim.ranges.histogram import Histogram
from fxslim.ranges.symmetric_ranges import check_grid_of


class RangeMethod(ABC):
    """Watches batches, then names the range to quantize.

    ``state()`` is plain tensors of fixed shape, to keep in buffers or to gather from all ranks; ``load_state``
    takes them back. The range always holds 0; of data that is all 0 it is (0, 0). A symmetric one goes to the
    ends of its grid, (-128, 127) scales for int8: from it any grid of these steps gets this very scale.
    """

    name: ClassVar[str]

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take a batch into account; an empty one changes nothing."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What was seen."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state`` gave."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take into account what another one has seen: that of another rank, for instance."""

    @abstractmethod
    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]: ...

    def range(self, quant_min: int, quant_max: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """(clip_min, clip_max) for a grid of the integers from quant_min to quant_max."""
        check_grid_of(quant_min, quant_max, symmetric)
        return self._chosen(quant_min, quant_max, symmetric)


class HistogramMethod(RangeMethod):
    """A method that needs no more than the histogram of what it saw."""

    def __init__(self, bins: int = 2048) -> None:
        self.histogram = Histogram.empty(bins)

    def observe(self, x: Tensor) -> None:
        """One pass over x, two where it widens the range or lies on a GPU."""
        self.histogram = self.histogram.observe(x)

    def state(self) -> dict[str, Tensor]:
        """The histogram's fields."""
        return self.histogram.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from these fields."""
        self.histogram = Histogram.from_state(state)

    def merge(self, other: Self) -> None:
        """Add the other's histogram."""
        self.histogram = self.histogram.merged(other.histogram)

    def _as_clips(self, clip_min: Tensor, clip_max: Tensor) -> tuple[Tensor, Tensor]:
        low = self.histogram.low
        return clip_min.to(low.device, low.dtype), clip_max.to(low.device, low.dtype)
