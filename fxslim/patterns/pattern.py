# SPDX-License-Identifier: Apache-2.0
"""What all patterns share: they choose a mask from scores, and count how far a weight follows them."""

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from fxslim.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Count:
    """Of one weight: groups that the pattern looks at, and how many of them it finds too full.

    For patterns by ratio ``violations`` is how many more would have to be 0.
    """

    groups: int
    violations: int


class Pattern(ABC):
    """A shape of sparsity, as frozen data. Weights are (out, in, *kernel); those of a linear layer (out, in)."""

    kind: ClassVar[str]

    @abstractmethod
    def removed(self) -> float | None:
        """The fraction of entries that go; None where it is still to be said."""

    @abstractmethod
    def at(self, ratio: float | None) -> Self:
        """The same pattern with this fraction removed; an error where the two contradict."""

    @abstractmethod
    def gentler(self, ratio: float) -> "Pattern":
        """The pattern with at most this fraction removed, as schedules pass through."""

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """True where an entry stays: the smallest magnitudes go, of a weight or of scores.

        Of equal entries the later go, of equal blocks the earlier. NaN counts for more than infinity.
        """

    @abstractmethod
    def count(self, nonzero: Tensor) -> Count:
        """How far a weight follows the pattern, from where it is not 0."""

    @abstractmethod
    def obstacle(self, shape: tuple[int, ...], groups: int) -> str:
        """Why a weight of this shape, of a layer with so many groups, can't follow the pattern; "" where it can."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain data."""


def check_ratio(ratio: Any, name: str = "ratio") -> None:
    """A fraction removed: a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or math.isnan(ratio):
        raise ConfigError(f"{name} must be a number in [0, 1), got {ratio!r}")
    if not 0 <= float(ratio) < 1:
        raise ConfigError(f"{name}={ratio} must be in [0, 1): the fraction that is removed")


def one_ratio(own: float | None, given: float | None, pattern: object) -> float | None:
    """The ratio of a pattern and the one given beside it: either, or both if they agree.

    >>> one_ratio(None, 0.5, "cin32cout64")
    0.5
    """
    if given is None:
        return own
    check_ratio(given)
    if own is not None and own != given:
        raise ConfigError(f"ratio={given} contradicts {pattern}: give the ratio once")
    return float(given)
