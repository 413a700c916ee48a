# SPDX-License-Identifier: Apache-2.0
"""Simple figures of the filter that makes a channel: mean, sum and maximum of |w|, and how many are above a threshold.

They compare channels of all layers as they are, as Lianzhi does; ``normalize="mean"`` makes layers alike first.
"""

import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError
from fxslim.graph.slots import Slot, owner
from fxslim.pruning.importance.aggregation import SlotValue, WeightImportance
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.slot_sums import maxima, summed


def _mean_magnitudes(context: Context, slots: list[Slot]) -> Iterator[SlotValue]:
    for slot, values in summed(context, slots, torch.abs_):
        holding, entries = context.holding(slot), len(slot.ids)
        slice_size = context.states[slot.name].numel() / entries
        yield SlotValue(slot=slot, values=holding.sums(values) / holding.counts / slice_size, grows=False)


@dataclass(frozen=True, kw_only=True)
class ConvAvg(WeightImportance):
    """The mean of |w| of the filter (the seed's table leaves out the magnitude, its source has it)."""

    name: ClassVar[str] = "conv_avg"
    over: str = "producers"
    normalize: str | None = None

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Means of magnitudes."""
        return _mean_magnitudes(context, self.slots(context))


@dataclass(frozen=True, kw_only=True)
class ConvAll(WeightImportance):
    """The sum of |w| of the filter: as they are, layers with small filters lose more."""

    name: ClassVar[str] = "conv_all"
    over: str = "producers"
    normalize: str | None = None

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Sums of magnitudes."""
        for slot, values in summed(context, self.slots(context), torch.abs_):
            yield SlotValue(slot=slot, values=context.holding(slot).sums(values))


@dataclass(frozen=True, kw_only=True)
class ConvMax(WeightImportance):
    """The largest |w| of the filter."""

    name: ClassVar[str] = "conv_max"
    over: str = "producers"
    normalize: str | None = None

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Largest magnitudes."""
        for slot in self.slots(context):
            values = context.holding(slot).maxima(maxima(context, slot))
            yield SlotValue(slot=slot, values=values, grows=False)


@dataclass(frozen=True, kw_only=True)
class ConvThreshold(WeightImportance):
    """How many |w| of the filter are above a threshold, as the seed's text says (its source counts those below).

    Counts mean something within a layer, so by default each layer is divided by its mean.
    """

    name: ClassVar[str] = "conv_threshold"
    over: str = "producers"
    threshold: float = 0.06

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < np.inf:
            raise ConfigError(f"importance 'conv_threshold': threshold={value!r} must be a number of at least 0")

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Counts of large magnitudes."""

        def large(values: Tensor) -> Tensor:
            # What is no number stays none, so that it is found.
            nan = values * 0
            return values.abs_().gt_(self.threshold).add_(nan)

        for slot, values in summed(context, self.slots(context), large):
            yield SlotValue(slot=slot, values=context.holding(slot).sums(values))


@dataclass(frozen=True, kw_only=True)
class Dnn(WeightImportance):
    """The mean of |w| over the weights that enter a neuron of a linear layer."""

    name: ClassVar[str] = "dnn"
    missing: ClassVar[str] = "are made by no linear layer, which importance='dnn' is for"
    over: str = "producers"
    normalize: str | None = None

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Means of magnitudes in linear layers."""
        return _mean_magnitudes(context, [s for s in self.slots(context) if _is_linear(context, s)])


def _is_linear(context: Context, slot: Slot) -> bool:
    """By the weight, since users write linear layers of their own."""
    other = nn.Embedding | nn.EmbeddingBag | nn.RNNBase | nn.RNNCellBase
    return context.states[slot.name].dim() == 2 and not isinstance(context.model.get_submodule(owner(slot.name)), other)
