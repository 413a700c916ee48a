# SPDX-License-Identifier: Apache-2.0
"""What channels look like while data runs: how often they are 0, how large they are.

A channel's value is what the layers that read it get, behind its norm and activation function.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxslim.pruning.importance.aggregation import SlotImportance, SlotValue
from fxslim.pruning.importance.channel_values import read_or_made
from fxslim.pruning.importance.criterion import Context

UNSEEN = "were read by no layer while the data ran (no product or convolution with their weights was seen)"


def _not_zero(values: Tensor) -> Tensor:
    # What is no number stays none, so that it is found.
    return (values != 0) + values * 0


@dataclass(frozen=True, kw_only=True)
class APoZ(SlotImportance):
    """1 - the average percentage of zeros: the more often a channel is exactly 0, the earlier it goes."""

    name: ClassVar[str] = "apoz"
    missing: ClassVar[str] = UNSEEN
    normalize: str | None = None

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Shares of what is not 0."""
        for slot, shares in read_or_made(context, self.name, _not_zero):
            holding = context.holding(slot)
            yield SlotValue(slot=slot, values=holding.sums(shares) / holding.counts, grows=False)


@dataclass(frozen=True, kw_only=True)
class MeanActivation(SlotImportance):
    """The mean magnitude of a channel (behind a ReLU that is its mean)."""

    name: ClassVar[str] = "mean_activation"
    missing: ClassVar[str] = UNSEEN

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Means of magnitudes."""
        for slot, means in read_or_made(context, self.name, Tensor.abs):
            holding = context.holding(slot)
            yield SlotValue(slot=slot, values=holding.sums(means) / holding.counts, grows=False)
