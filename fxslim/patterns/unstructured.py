# SPDX-License-Identifier: Apache-2.0
"""Any entries, wherever they are."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.patterns.pattern import Count, Pattern, check_ratio, one_ratio


@dataclass(frozen=True)
class Unstructured(Pattern):
    """``round(ratio * size)`` entries go: of the whole weight, or of each output (``per_output``).

    >>> Unstructured(0.5).mask(torch.tensor([[1.0, 4.0], [2.0, 3.0]]))
    tensor([[False,  True],
            [False,  True]])
    """

    kind: ClassVar[str] = "unstructured"

    ratio: float | None = None
    per_output: bool = False

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio)
        if not isinstance(self.per_output, bool):
            raise ConfigError(f"per_output must be True or False, got {self.per_output!r}")

    def __str__(self) -> str:
        text = "unstructured" + (" per output" if self.per_output else "")
        return text + ("" if self.ratio is None else f" {self.ratio:.0%}")

    def removed(self) -> float | None:
        """The ratio."""
        return self.ratio

    def at(self, ratio: float | None) -> Self:
        """With this ratio."""
        return replace(self, ratio=one_ratio(self.ratio, ratio, self))

    def gentler(self, ratio: float) -> Self:
        """With this ratio instead."""
        return replace(self, ratio=ratio)

    def mask(self, scores: Tensor) -> Tensor:
        """Without the smallest."""
        rows = scores.detach().abs().reshape(scores.shape[0] if self.per_output else 1, -1)
        return _highest(rows, round((self.ratio or 0.0) * rows.shape[1])).view(scores.shape)

    def count(self, nonzero: Tensor) -> Count:
        """Entries, and how many more of them should be 0."""
        rows = nonzero.reshape(nonzero.shape[0] if self.per_output else 1, -1)
        missing = round((self.ratio or 0.0) * rows.shape[1]) - (~rows).sum(1)
        return Count(groups=rows.numel(), violations=int(missing.clamp(min=0).sum()))

    def obstacle(self, shape: tuple[int, ...], groups: int) -> str:
        """Too few entries for the ratio."""
        size = torch.Size(shape[1:] if self.per_output else shape).numel()
        num_removed = round((self.ratio or 0.0) * size)
        if self.ratio and num_removed in (0, size):
            return f"{size} entries: {self} would remove {'all' if num_removed else 'none'}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain data."""
        return {"kind": self.kind, "ratio": self.ratio, "per_output": self.per_output}


def _highest(rows: Tensor, num_removed: int) -> Tensor:
    """All but so many of each row; of equal ones the later go.

    >>> _highest(torch.tensor([[1.0, 1.0, 1.0, 2.0]]), 2)
    tensor([[ True, False, False,  True]])
    """
    if not num_removed or not rows.numel():
        return torch.ones_like(rows, dtype=torch.bool)
    limit = rows.kthvalue(num_removed, dim=1, keepdim=True).values
    kept = (rows > limit) | rows.isnan()
    equal = rows == limit
    # A NaN limit leaves too few numbers to remove: NaN themselves go, the later first.
    equal |= rows.isnan() & limit.isnan()
    kept &= ~equal
    stays = rows.shape[1] - num_removed - kept.sum(1, keepdim=True)
    return kept | (equal & (equal.cumsum(1) <= stays))
