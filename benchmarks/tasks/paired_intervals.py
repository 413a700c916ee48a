# SPDX-License-Identifier: Apache-2.0
"""Means and 95 % intervals of a few paired differences, by Student's t."""

import math
import statistics
from dataclasses import dataclass

# The 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean of n differences and half the width of its 95 % interval (no half width for n = 1)."""

    mean: float
    half: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.half is None else f" ± {self.half:.2f}") + "*" * self.clear


def paired_interval(values: list[float], baseline: list[float]) -> Interval:
    """How much the values exceed the baseline's, pair by pair.

    >>> print(paired_interval([91.0, 92.0, 93.0], [90.0, 91.0, 91.0]))
    +1.33 ± 1.43
    """
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    if n == 1:
        return Interval(mean=mean, half=None, n=1)
    if n - 1 > len(T_975):
        raise ValueError(f"{n} pairs, but the table of Student's t goes to {len(T_975) + 1}")
    half = T_975[n - 2] * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean=mean, half=half, n=n)
