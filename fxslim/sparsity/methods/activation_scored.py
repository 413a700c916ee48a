# SPDX-License-Identifier: Apache-2.0
"""Weights are judged together with what they are multiplied with: Wanda, and a searched weighting of the two."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.patterns import Pattern, Unstructured
from fxslim.patterns.pattern import check_ratio
from fxslim.sparsity.methods.method import Method, Seen, input_norms, output_error


@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """|weight| times the length of its input; unstructured patterns compare within each output, as published."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[str] = "squares"

    def scores(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """|w| * ||x||."""
        return weight.abs() * input_norms(weight, seen.parts)

    def pattern_for(self, pattern: Pattern) -> Pattern:
        """Per output."""
        return replace(pattern, per_output=True) if isinstance(pattern, Unstructured) else pattern


@dataclass(frozen=True, kw_only=True)
class Par(Method):
    """|weight| times a power of the length of its input: the exponent whose mask changes the layer's outputs least.

    0 is magnitude, 1 is Wanda. ``version`` 2 gathers what a layer reads after the layers before it were made sparse.
    ``attention_ratio`` and ``mlp_ratio`` are ratios of their own for layers whose names say what they belong to.
    """

    name: ClassVar[str] = "par"
    needs: ClassVar[str] = "products"

    version: int = 1
    exponents: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    attention_ratio: float | None = None
    mlp_ratio: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponents", tuple(self.exponents))
        if self.version not in (1, 2):
            raise ConfigError(f"version={self.version!r} must be 1 or 2")
        if not self.exponents or not all(isinstance(e, int | float) and 0 <= e < 10 for e in self.exponents):
            raise ConfigError(f"exponents={self.exponents!r} must be numbers in [0, 10), at least one")
        for name in ("attention_ratio", "mlp_ratio"):
            if getattr(self, name) is not None:
                check_ratio(getattr(self, name), name)

    def scores(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """|w| * ||x||^e with the best e."""
        norms = input_norms(weight, seen.parts)
        usual = norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
        best, least = weight.abs(), float("inf")
        for exponent in self.exponents:
            scores = weight.abs() * (norms / usual) ** exponent
            error = output_error(weight, pattern.mask(scores), seen.parts)
            if error < least:
                best, least = scores, error
        return best
