# SPDX-License-Identifier: Apache-2.0
"""Norms of the weights that make and read a channel: l1, l2, linf; AMCT's balanced l2."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fxslim.pruning.importance.aggregation import SlotValue, WeightImportance
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.slot_sums import maxima, summed


@dataclass(frozen=True, kw_only=True)
class L1(WeightImportance):
    """The sum of magnitudes, sum |w|."""

    name: ClassVar[str] = "l1"

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Sums of magnitudes."""
        for slot, values in summed(context, self.slots(context), torch.abs_):
            yield SlotValue(slot=slot, values=context.holding(slot).sums(values))


@dataclass(frozen=True, kw_only=True)
class L2(WeightImportance):
    """The Euclidean norm, the root of sum w^2: squares are normalized and averaged, and the root comes last."""

    name: ClassVar[str] = "l2"

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Sums of squares."""
        for slot, values in summed(context, self.slots(context), torch.square_):
            yield SlotValue(slot=slot, values=context.holding(slot).sums(values))

    def finish(self, scores: np.ndarray) -> np.ndarray:
        """From squares to norms."""
        return np.sqrt(scores)


@dataclass(frozen=True, kw_only=True)
class LInf(WeightImportance):
    """The largest magnitude, max |w|."""

    name: ClassVar[str] = "linf"

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Largest magnitudes."""
        for slot in self.slots(context):
            values = context.holding(slot).maxima(maxima(context, slot))
            yield SlotValue(slot=slot, values=values, grows=False)


@dataclass(frozen=True, kw_only=True)
class BalancedL2(WeightImportance):
    """AMCT's balanced l2: norms brought to 0 ... 1 in each layer that makes the channel, summed over the tied ones.

    AMCT divides the norms by the size of a filter first, which bringing them to 0 ... 1 undoes.
    """

    name: ClassVar[str] = "balanced_l2"
    adds_slots: ClassVar[bool] = True
    over: str = "producers"
    normalize: str | None = "minmax"

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """The norm of all that a class has in the slot."""
        for slot, values in summed(context, self.slots(context), torch.square_):
            yield SlotValue(slot=slot, values=np.sqrt(context.holding(slot).sums(values)), grows=False)
