# SPDX-License-Identifier: Apache-2.0
"""N:M: n kept of every m neighbours."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fxslim import kernels
from fxslim.errors import ConfigError
from fxslim.patterns.pattern import Count, Pattern, check_ratio


@dataclass(frozen=True)
class NM(Pattern):
    """``n`` of every ``m`` consecutive entries along ``axis`` stay, in each row and at each kernel position.

    Axis 1 runs over input channels, 0 over output channels. A shorter last group keeps at most n.

    >>> NM(2, 4).mask(torch.tensor([[1.0, 3.0, 2.0, 2.0, 5.0]]))
    tensor([[False,  True,  True, False,  True]])
    """

    kind: ClassVar[str] = "n:m"

    n: int
    m: int
    axis: int = 1

    def __post_init__(self) -> None:
        for name in ("n", "m", "axis"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an integer, got {value!r}")
        if not 1 <= self.n <= self.m:
            raise ConfigError(f"n={self.n}, m={self.m}: n kept of m needs 1 <= n <= m")
        if self.axis not in (0, 1):
            raise ConfigError(f"axis={self.axis} must be 1 (input channels) or 0 (output channels)")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (" along outputs" if self.axis == 0 else "")

    def removed(self) -> float:
        """1 - n/m."""
        return 1 - self.n / self.m

    def at(self, ratio: float | None) -> Self:
        """Itself: n and m say the ratio."""
        if ratio is not None:
            check_ratio(ratio)
            if abs(ratio - self.removed()) > 1e-9:
                raise ConfigError(
                    f"ratio={ratio} contradicts {self}, which removes {self.removed():g}: leave ratio= out, or give "
                    "a pattern by ratio ('cin32cout64', Unstructured)"
                )
        return self

    def gentler(self, ratio: float) -> "NM":
        """Of the same m, the one that removes at most this fraction, and keeps one.

        >>> NM(2, 4).gentler(0.3)
        NM(n=3, m=4, axis=1)
        """
        return NM(max(1, self.m - int(ratio * self.m + 1e-9)), self.m, self.axis)

    def mask(self, scores: Tensor) -> Tensor:
        """The n highest of every m."""
        return kernels.nm_mask(scores, self.n, self.m, self.axis)

    def count(self, nonzero: Tensor) -> Count:
        """Groups with more than n entries."""
        length = nonzero.shape[self.axis]
        rows = nonzero.movedim(self.axis, -1)
        whole = torch.nn.functional.pad(rows, (0, -length % self.m)).unflatten(-1, (-1, self.m)).sum(-1)
        return Count(groups=whole.numel(), violations=int((whole > self.n).sum()))

    def obstacle(self, shape: tuple[int, ...], groups: int) -> str:
        """Fewer channels than n: nothing would go."""
        if self.n == self.m or shape[self.axis] > self.n:
            return ""
        what = "output" if self.axis == 0 else "input"
        each = " in each group" if groups > 1 else ""
        return f"{shape[self.axis]} {what} channels{each}: {self} would remove nothing"

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain data."""
        return {"kind": self.kind, "n": self.n, "m": self.m, "axis": self.axis}
