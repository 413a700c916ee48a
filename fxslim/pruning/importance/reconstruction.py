# SPDX-License-Identifier: Apache-2.0
"""How much the outputs of the layers that read a channel change without it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxslim.pruning.importance.activations import UNSEEN
from fxslim.pruning.importance.aggregation import SlotImportance, SlotValue
from fxslim.pruning.importance.channel_values import channel_means, readers
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.slot_sums import summed


def _energy(values: Tensor) -> Tensor:
    return values.double().square()


@dataclass(frozen=True, kw_only=True)
class Reconstruction(SlotImportance):
    """E[x_c^2] * ||W_c||^2 for each layer that reads the channel, with E over data and positions.

    The entries of a head add up, as if they were independent; so do a kernel's positions.
    """

    name: ClassVar[str] = "reconstruction"
    missing: ClassVar[str] = UNSEEN

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Mean squares of inputs times squared norms of the weights that read them."""
        means = list(channel_means(context, self.name, readers(context, "consumer"), _energy))
        squares = {slot.key: values for slot, values in summed(context, [slot for slot, _ in means], torch.square_)}
        for slot, mean in means:
            yield SlotValue(slot=slot, values=context.holding(slot).sums(mean * squares[slot.key]))
