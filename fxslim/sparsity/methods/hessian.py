# SPDX-License-Identifier: Apache-2.0
"""Second order: what stays makes up for what goes, as far as the data allow (SparseGPT, optimal brain surgeon)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.patterns import NM, Block, Pattern, Unstructured
from fxslim.sparsity.methods.method import Method, Seen, input_norms
from fxslim.sparsity.second_order import prune_by_hessian


@dataclass(frozen=True, kw_only=True)
class Hessian(Method):
    """Removes what costs the least output error once the rest is adjusted, and adjusts the rest.

    ``damping``: a fraction of the mean square of inputs, added to each; ``block_size``: columns between two updates
    of all that follow; ``sweeps``: how often every kept weight then makes up for all others, which takes as long again
    and pays where there are many more samples than inputs.
    """

    name: ClassVar[str] = "hessian"
    needs: ClassVar[str] = "products"
    changes_weights: ClassVar[bool] = True

    damping: float = 0.01
    block_size: int = 128
    sweeps: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.damping, bool) or not 0 <= self.damping < float("inf"):
            raise ConfigError(f"damping={self.damping!r} must be a number >= 0")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size!r} must be an integer >= 1")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise ConfigError(f"sweeps={self.sweeps!r} must be an integer >= 0")

    def scores(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """Without adjustment, for comparisons between layers: the error that each entry alone makes."""
        return (weight * input_norms(weight, seen.parts)).square()

    def choose(self, weight: Tensor, seen: Seen, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
        """Part by part: rows that read the same."""
        if not isinstance(pattern, NM | Block | Unstructured):
            raise ConfigError(f"method 'hessian' knows no pattern {pattern}: take another method")
        masks, values, done, gone = [], [], 0, 0
        for part in seen.parts:
            rows = weight[part.first : part.last]
            own: NM | Block | Unstructured = pattern
            if isinstance(pattern, Unstructured) and not pattern.per_output and len(seen.parts) > 1:
                # Rounded once for all parts together.
                done += rows.numel()
                num = round((pattern.ratio or 0.0) * done) - gone
                own, gone = replace(pattern, ratio=num / rows.numel()), gone + num
            mask, value = prune_by_hessian(
                rows, part.gram, own, damping=self.damping, block_size=self.block_size, sweeps=self.sweeps
            )
            masks.append(mask)
            values.append(value)
        return torch.cat(masks), torch.cat(values)
