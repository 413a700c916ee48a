# SPDX-License-Identifier: Apache-2.0
"""The moving average of every batch's smallest and largest value."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.ranges.min_max import MinMax


class MovingAverage(MinMax):
    """``old + averaging * (observed - old)`` for both ends, batch by batch.

    >>> method = MovingAverage(averaging=0.5)
    >>> for batch in (torch.tensor([-1.0, 2.0]), torch.tensor([-2.0, 4.0])):
    ...     method.observe(batch)
    >>> method.range(-128, 127)
    (tensor(-1.5000), tensor(3.))
    """

    name: ClassVar[str] = "moving_average"

    def __init__(self, *, averaging: float = 0.01, axis: int | None = None) -> None:
        super().__init__(axis=axis)
        if isinstance(averaging, bool) or not isinstance(averaging, int | float) or not 0.0 < averaging <= 1.0:
            raise ConfigError(f"averaging={averaging!r} must be a number in (0, 1]")
        self.averaging = averaging

    def _updated(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._average(self.low, low), self._average(self.high, high)

    def _average(self, old: Tensor, now: Tensor) -> Tensor:
        return torch.where(torch.isinf(old), now, old + (now - old) * self.averaging)

    def merge(self, other: Self) -> None:
        """The mean of both ranges, each counting as much as it has seen."""
        if other.num_seen == 0:
            return
        share = other.num_seen.to(self.low.device) / (self.num_seen + other.num_seen.to(self.low.device))
        mean = [
            torch.where(torch.isinf(mine), theirs, mine + (theirs - mine) * share.to(mine.dtype))
            for mine, theirs in ((self.low, other.low.to(self.low.device)), (self.high, other.high.to(self.low.device)))
        ]
        super().merge(other)
        self.low, self.high = mean
