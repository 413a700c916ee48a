# SPDX-License-Identifier: Apache-2.0
"""From the slots of a group to one number for each channel: normalized within each slot, then the mean over slots."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxslim.graph.slots import Slot
from fxslim.pruning.importance.criterion import Context, Holding, Importance, check_choice

ROLES = {"group": ("producer", "consumer", "depthwise"), "producers": ("producer",)}
NORMALIZATIONS = ("mean", "max", "minmax", None)


@dataclass(frozen=True, kw_only=True)
class SlotValue:
    """What a slot says of its classes: a value for each, and whether a value grows with the number of entries."""

    slot: Slot
    values: np.ndarray
    grows: bool = True


@dataclass(frozen=True, kw_only=True)
class SlotImportance(Importance):
    """A criterion that gives numbers slot by slot; a channel gets the mean over its slots.

    ``normalize``: the values of a slot are divided by their mean ("mean": 1 is average, so that layers of any size
    count alike) or maximum ("max"), brought to 0 ... 1 ("minmax"), or taken as they are (None). Normalized values
    are per entry, so that a head of 64 entries counts as a channel of one does; values as they are count all entries.
    """

    normalize: str | None = "mean"
    # Slots of one class count as their mean; AMCT's balanced norm adds them up.
    adds_slots: ClassVar[bool] = False
    missing: ClassVar[str] = "have no weights that this importance looks at"

    def __post_init__(self) -> None:
        check_choice(self.name, "normalize", self.normalize, NORMALIZATIONS)

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """A value for each class of each slot that says something."""
        raise NotImplementedError(f"{type(self).__name__} has no method slot_values(context)")

    def finish(self, scores: np.ndarray) -> np.ndarray:
        """The last step, on the scores of all classes."""
        return scores

    def scores(self, context: Context) -> np.ndarray:
        """The mean over slots of their normalized values, for each class."""
        total, count = np.zeros((2, len(context.graph.resolved.classes)))
        for found in self.slot_values(context):
            holding = context.holding(found.slot)
            values = without_noise(found.values)
            total[holding.classes] += normalized(values, holding, self.normalize, grows=found.grows)
            count[holding.classes] += 1
        context.check_scored(count > 0, self.missing)
        return self.finish(total if self.adds_slots else total / np.maximum(count, 1))


@dataclass(frozen=True, kw_only=True)
class WeightImportance(SlotImportance):
    """A criterion of weights.

    ``over``: all weights of a group that hold the channel, those that make it and those that read it ("group"), or
    only those that make it ("producers").
    """

    over: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "over", self.over, ROLES)

    def slots(self, context: Context) -> list[Slot]:
        """The slots that count."""
        return context.slots(ROLES[self.over])


def without_noise(values: np.ndarray) -> np.ndarray:
    """Rounded to 12 digits: the order of a sum's terms, which libraries choose, must not rank equal channels.

    >>> np.unique(without_noise(np.array([0.1 + 0.2, 0.3]))).size
    1
    """
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissas, 40)), exponents - 40)


def normalized(values: np.ndarray, holding: Holding, how: str | None, *, grows: bool) -> np.ndarray:
    """The values of a slot's classes, comparable with those of other slots.

    >>> normalized(np.array([1.0, 3.0]), Holding(np.array([5, 6])), "mean", grows=True)
    array([0.5, 1.5])
    """
    if how is None:
        return values
    per_entry = values / holding.counts if grows else values
    if how == "minmax":
        low, high = per_entry.min(), per_entry.max()
        return (per_entry - low) / (high - low) if high > low else np.zeros_like(per_entry)
    scale = per_entry.max() if how == "max" else np.average(per_entry, weights=holding.counts)
    return per_entry / scale if scale > 0 else per_entry
