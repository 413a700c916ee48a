# SPDX-License-Identifier: Apache-2.0
"""The smallest weights go: no data needed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.patterns import Pattern
from fxslim.sparsity.methods.method import Method, Seen


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """By magnitude. ``norm`` 2 squares: blocks are then compared by the mean of squares."""

    name: ClassVar[str] = "magnitude"

    norm: int = 1

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise ConfigError(f"norm={self.norm!r} must be 1 or 2")

    def scores(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """|w|, or its square."""
        return weight.abs() if self.norm == 1 else weight.double().square()
