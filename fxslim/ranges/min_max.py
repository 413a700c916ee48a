# SPDX-License-Identifier: Apache-2.0
"""Everything that was seen, from the smallest to the largest value."""

from typing import ClassVar, Self

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels import observe_min_max
from fxslim.ranges.finite_data import are_finite, check_seen, num_not_finite
from fxslim.ranges.method import RangeMethod
from fxslim.ranges.symmetric_ranges import range_with_zero


class MinMax(RangeMethod):
    """The smallest and the largest value, of all data or of each channel along ``axis``.

    >>> method = MinMax()
    >>> method.observe(torch.tensor([-1.0, 3.0]))
    >>> method.range(-128, 127)
    (tensor(-1.), tensor(3.))
    """

    name: ClassVar[str] = "min_max"

    def __init__(self, *, axis: int | None = None) -> None:
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise ConfigError(f"axis={axis!r} must be a whole number, or None for one range per tensor")
        self.axis = axis
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.num_seen, self.num_bad = torch.zeros(2, dtype=torch.int64).unbind()

    def observe(self, x: Tensor) -> None:
        """One pass over x; one more on a GPU, which is not waited for."""
        if x.numel() == 0:
            return
        low, high = observe_min_max(x, self.axis)
        if self.num_seen.device != x.device:
            self.load_state({name: value.to(x.device) for name, value in self.state().items()})
        if self.low.dim() > 0 and self.low.shape != low.shape:
            raise ConfigError(
                f"{low.numel()} channels along axis {self.axis} of {tuple(x.shape)}, {self.low.numel()} before:"
                " every batch needs the same number"
            )
        if not are_finite(low, high):
            num_bad = num_not_finite(x)
            if x.device.type == "cpu":
                check_seen(x.numel(), num_bad)
            self.num_bad = self.num_bad + num_bad
        self.low, self.high = self._updated(low, high)
        self.num_seen = self.num_seen + x.numel()

    def _updated(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(self.low, low), torch.maximum(self.high, high)

    def state(self) -> dict[str, Tensor]:
        """Both ends, and how much was seen."""
        return {"low": self.low, "high": self.high, "num_seen": self.num_seen, "num_bad": self.num_bad}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from these."""
        self.low, self.high = state["low"], state["high"]
        self.num_seen, self.num_bad = state["num_seen"], state["num_bad"]

    def merge(self, other: Self) -> None:
        """Widen by what the other has seen."""
        low, high = other.low.to(self.low.device), other.high.to(self.low.device)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.num_seen = self.num_seen + other.num_seen.to(self.low.device)
        self.num_bad = self.num_bad + other.num_bad.to(self.low.device)

    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        check_seen(self.num_seen, self.num_bad)
        return range_with_zero(self.low, self.high, quant_min, quant_max, symmetric)
