# SPDX-License-Identifier: Apache-2.0
"""What all methods share: scores of a weight's entries, from the weight and what was seen of the data."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxslim.patterns import Pattern
from fxslim.sparsity.input_statistics import Part


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What data told of one weight: what its rows read, and the mean magnitude of weight times gradient."""

    parts: tuple[Part, ...] = ()
    gradient: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Chooses masks. ``needs``: "" (weights alone), "squares" or "products" of inputs, or "gradients"."""

    name: ClassVar[str]
    needs: ClassVar[str] = ""
    # New values for what stays, too.
    changes_weights: ClassVar[bool] = False

    @abstractmethod
    def scores(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """A number >= 0 for each entry of a weight (out, in, *kernel): the lowest go first."""

    def choose(self, weight: Tensor, seen: Seen, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
        """The mask, and new values of the weight where the method has any."""
        return pattern.mask(self.scores(weight, seen, pattern)), None

    def pattern_for(self, pattern: Pattern) -> Pattern:
        """The pattern with what this method takes for granted where the user left it open."""
        return pattern

    def to_dict(self) -> dict[str, Any]:
        """The method as plain data."""
        return {"name": self.name, **asdict(self)}


def output_error(weight: Tensor, mask: Tensor, parts: tuple[Part, ...], values: Tensor | None = None) -> float:
    """The squared distance of a layer's outputs from what they were, summed over the data."""
    total = 0.0
    lost = (weight - torch.where(mask, weight if values is None else values, 0)).flatten(1)
    for part in parts:
        rows = lost[part.first : part.last].to(part.gram.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            total += float((rows @ part.gram).mul_(rows).sum())
    return max(total, 0.0)


def input_norms(weight: Tensor, parts: tuple[Part, ...]) -> Tensor:
    """The length of what each entry of a weight was multiplied with, over the data; shaped as the weight."""
    rows = weight.flatten(1)
    found = torch.empty(rows.shape, dtype=parts[0].gram.dtype, device=weight.device)
    for part in parts:
        squares = part.gram if part.gram.dim() == 1 else part.gram.diagonal()
        found[part.first : part.last] = squares.clamp(min=0).sqrt()
    return found.view(weight.shape)
