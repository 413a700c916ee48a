# SPDX-License-Identifier: Apache-2.0
"""Does a weight follow a pattern, and how sparse is it?"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.patterns.names import as_pattern
from fxslim.patterns.pattern import Pattern
from fxslim.patterns.weight_layout import layout_of


@dataclass(frozen=True, kw_only=True)
class PatternCheck:
    """``groups`` of the pattern (of m, blocks, or entries), ``violations`` among them, the share of entries at 0."""

    pattern: Pattern
    groups: int
    violations: int
    sparsity: float

    @property
    def ok(self) -> bool:
        """No violations."""
        return not self.violations


def check(weight: Any, pattern: Any) -> PatternCheck:
    """Count violations and zeros of a layer, or of a weight that is (out, in, *kernel).

    A masked layer is looked at as it computes, a mask as if it were the weight.

    >>> import torch
    >>> check(torch.tensor([[1.0, 0.0, 2.0, 3.0], [0.0, 1.0, 0.0, 0.0]]), "2:4")
    PatternCheck(pattern=NM(n=2, m=4, axis=1), groups=2, violations=1, sparsity=0.5)
    """
    pattern, tensor = as_pattern(pattern), weight
    if isinstance(weight, nn.Module):
        tensor = getattr(weight, "weight", None)
        effective = getattr(weight, "masked", None)
        if tensor is not None and callable(effective):
            tensor = effective()
    if not isinstance(tensor, Tensor) or tensor.dim() < 2:
        raise ConfigError(f"a weight has at least 2 dims: (out, in); got {_described(weight, tensor)}")
    if tensor.is_meta:
        raise ConfigError(f"{_described(weight, tensor)} is on the meta device and has no values to look at")
    if isinstance(weight, nn.Module):
        tensor = layout_of(weight).rows(tensor)
    nonzero = tensor.detach() != 0
    count = pattern.count(nonzero)
    sparsity = 1 - float(nonzero.sum()) / max(1, nonzero.numel())
    return PatternCheck(pattern=pattern, groups=count.groups, violations=count.violations, sparsity=sparsity)


def _described(given: Any, tensor: Any) -> str:
    shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
    return f"a {type(given).__name__}{shape}"
