# SPDX-License-Identifier: Apache-2.0
"""Weights whose removal changes the loss least, to first order."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxslim.patterns import Pattern
from fxslim.sparsity.methods.method import Method, Seen


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Method):
    """The mean over batches of |weight times gradient|; needs ``data`` with targets, or ``loss``."""

    name: ClassVar[str] = "first_order"
    needs: ClassVar[str] = "gradients"

    def scores(self, weight: Tensor, seen: Seen, pattern: Pattern) -> Tensor:
        """What was gathered."""
        assert seen.gradient is not None
        return seen.gradient
