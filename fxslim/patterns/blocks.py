# SPDX-License-Identifier: Apache-2.0
"""Blocks of input channels that are 0 in a whole block of filters: Cin32Cout64."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fxslim import kernels
from fxslim.errors import ConfigError
from fxslim.patterns.pattern import Count, Pattern, check_ratio, one_ratio


@dataclass(frozen=True, kw_only=True)
class Block(Pattern):
    """``cin`` consecutive input channels that are 0 in ``cout`` consecutive filters.

    ``per_position``: at one kernel position, or else over the whole kernel. The blocks with the lowest mean
    magnitude go, ``round(ratio * number of blocks)`` of them and never all. Channels that are left over at the end
    make smaller blocks; where there are fewer than cin or cout, all of them are one.

    >>> Block(cin=1, cout=2, ratio=0.5).mask(torch.tensor([[1.0, 3.0], [2.0, 1.0]]))
    tensor([[False,  True],
            [False,  True]])
    """

    kind: ClassVar[str] = "block"

    cin: int = 32
    cout: int = 64
    per_position: bool = True
    ratio: float | None = None

    def __post_init__(self) -> None:
        for name in ("cin", "cout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(self.per_position, bool):
            raise ConfigError(f"per_position must be True or False, got {self.per_position!r}")
        if self.ratio is not None:
            check_ratio(self.ratio)

    def __str__(self) -> str:
        kernel = "" if self.per_position else " whole kernels"
        return f"cin{self.cin}cout{self.cout}{kernel}" + ("" if self.ratio is None else f" {self.ratio:.0%}")

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
        """Without the blocks whose mean is lowest."""
        return kernels.block_mask(scores, self.ratio or 0.0, self.cin, self.cout, self.per_position)

    def num_blocks(self, shape: tuple[int, ...]) -> int:
        """How many blocks a weight has.

        >>> Block().num_blocks((64, 64, 3, 3)), Block(per_position=False).num_blocks((100, 3, 7, 7))
        (18, 2)
        """
        channels = -(-shape[0] // self.cout) * -(-shape[1] // self.cin)
        return channels * (torch.Size(shape[2:]).numel() if self.per_position else 1)

    def num_removed(self, shape: tuple[int, ...]) -> int:
        """How many of them go."""
        total = self.num_blocks(shape)
        return min(round((self.ratio or 0.0) * total), max(total - 1, 0))

    def any_in_block(self, nonzero: Tensor) -> Tensor:
        """(blocks of filters, blocks of channels, positions): whether a block has an entry."""
        entries = nonzero.flatten(2) if nonzero.dim() > 2 else nonzero.unsqueeze(2)
        if not self.per_position:
            entries = entries.any(2, keepdim=True)
        filters = torch.stack([part.any(0) for part in entries.split(self.cout, 0)])
        return torch.stack([part.any(1) for part in filters.split(self.cin, 1)], 1)

    def count(self, nonzero: Tensor) -> Count:
        """Blocks, and how many more of them should be 0."""
        full = self.any_in_block(nonzero)
        zero = int((~full).sum())
        return Count(groups=full.numel(), violations=max(0, self.num_removed(tuple(nonzero.shape)) - zero))

    def obstacle(self, shape: tuple[int, ...], groups: int) -> str:
        """Grouped layers, and those with too few blocks."""
        if groups > 1:
            return f"it has {groups} groups: blocks run over all input channels, and each filter reads only some"
        if self.ratio and not self.num_removed(shape):
            return f"{self.num_blocks(shape)} blocks of {self}: none would go"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain data."""
        return {
            "kind": self.kind, "cin": self.cin, "cout": self.cout, "per_position": self.per_position,
            "ratio": self.ratio,
        }  # fmt: skip
