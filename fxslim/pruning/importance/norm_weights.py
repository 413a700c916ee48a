# SPDX-License-Identifier: Apache-2.0
"""The weights of batch norms: a channel that its norm multiplies by little goes first."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fxslim.graph.slots import Slot
from fxslim.pruning.importance.criterion import Context, Importance
from fxslim.pruning.importance.slot_sums import check_finite

# Batch norms and instance norms.
NORMS = nn.modules.batchnorm._NormBase


def norm_slots(context: Context) -> list[Slot]:
    """The slots of the weights of batch norms (and of instance norms)."""
    norms = {f"{name}.weight".lstrip(".") for name, m in context.model.named_modules() if isinstance(m, NORMS)}
    return [slot for slot in context.slots(("follower",)) if slot.name in norms]


def norm_values(context: Context, slot: Slot) -> np.ndarray:
    """The weight of a norm, entry by entry."""
    values = context.values_of(slot.name).to("cpu", torch.float64).flatten().numpy()
    check_finite(slot.name, values)
    return values


@dataclass(frozen=True, kw_only=True)
class BatchNormWeight(Importance):
    """The magnitude of the batch norm's weight; with ``raw=True`` the weight with its sign, negative ones first.

    The seed's source ranks by the sign too, its text does not say: the magnitude is what a channel is multiplied by.
    """

    name: ClassVar[str] = "bn"
    raw: bool = False

    def scores(self, context: Context) -> np.ndarray:
        """The mean over the norms that a channel passes, and over its entries there."""
        total, count = np.zeros((2, len(context.graph.resolved.classes)))
        for slot in norm_slots(context):
            values, holding = norm_values(context, slot), context.holding(slot)
            total[holding.classes] += holding.sums(values if self.raw else np.abs(values)) / holding.counts
            count[holding.classes] += 1
        context.check_scored(count > 0, "pass no batch norm, which importance='bn' looks at")
        return total / np.maximum(count, 1)
