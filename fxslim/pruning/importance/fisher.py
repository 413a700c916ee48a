# SPDX-License-Identifier: Apache-2.0
"""Second order: the diagonal of the Hessian, estimated by the Fisher information."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fxslim.graph.slots import Slot, entry_sums
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.gradients import GradientImportance


@dataclass(frozen=True, kw_only=True)
class Fisher(GradientImportance):
    """Sum of w^2 E[g^2] / 2 over the channel's slice, from squared gradients of single samples.

    That is half of what ``Taylor(form="squared")`` gives: the second term of the loss at a minimum, where g averages 0.
    """

    name: ClassVar[str] = "fisher"

    def of_sample(self, product: Tensor, slot: Slot, context: Context) -> np.ndarray:
        """w^2 g^2 / 2 of one sample."""
        return context.holding(slot).sums(entry_sums(product.square(), slot).cpu().numpy()) / 2
