# SPDX-License-Identifier: Apache-2.0
"""Channels that resemble one that stays: the most similar goes, then the most similar of what is left, and so on.

The seed's source takes wrong indices after the first removal; here every step looks again at what is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fxslim.pruning.importance.aggregation import SlotImportance, SlotValue
from fxslim.pruning.importance.criterion import Context, Holding, Importance
from fxslim.pruning.importance.distances import class_vectors, squared_distances
from fxslim.pruning.importance.norm_weights import norm_slots, norm_values


def removal_order(distances: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """When each goes, from 0 on: the one with the smallest distance to another that is left, ties by index.

    What is ``fixed`` never goes, but others may resemble it.

    >>> near = np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]])
    >>> removal_order(near, np.zeros(3, dtype=bool)).tolist()
    [0, 1, 2]
    """
    distances = distances.astype(np.float32)
    np.fill_diagonal(distances, np.inf)
    nearest, smallest = _nearest(distances)
    smallest[fixed] = np.inf
    order = np.full(len(distances), len(distances) - 1, dtype=np.int64)
    left = ~fixed
    for number in range(int(left.sum())):
        gone = int(np.where(left, smallest, np.inf).argmin())
        if not left[gone]:
            gone = int(left.argmax())
        order[gone], left[gone] = number, False
        distances[:, gone] = np.inf
        again = np.flatnonzero(left & (nearest == gone))
        nearest[again], smallest[again] = _nearest(distances[again])
    return order


def _nearest(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of the smallest of each row, the last of equal ones, and itself.

    The first of equal ones goes first, and then all that have it for their nearest must look again.
    """
    places = distances.shape[1] - 1 - distances[:, ::-1].argmin(1)
    return places, distances[np.arange(len(distances)), places]


def _shares(context: Context, holding: Holding, chosen: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The order of removal as a share, in (0, 1], so that each layer gives up an equal part."""
    return (removal_order(distances, ~context.wanted[holding.classes[chosen]]) + 1) / len(chosen)


@dataclass(frozen=True, kw_only=True)
class ConvSimilarity(SlotImportance):
    """The order of removal by the squared distance between the |w| of a filter and of another one that is left."""

    name: ClassVar[str] = "conv_similarity"
    normalize: str | None = None

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Orders of removal."""
        for slot in context.slots(("producer",)):
            holding = context.holding(slot)
            values = np.zeros(len(holding.classes))
            for chosen, vectors in class_vectors(context, slot):
                values[chosen] = _shares(context, holding, chosen, squared_distances(vectors.abs()))
            yield SlotValue(slot=slot, values=values, grows=False)


@dataclass(frozen=True, kw_only=True)
class BatchNormSimilarity(Importance):
    """The order of removal by the squared difference between a weight of a batch norm and another one that is left."""

    name: ClassVar[str] = "bn_similarity"

    def scores(self, context: Context) -> np.ndarray:
        """The mean over the norms that a channel passes."""
        total, count = np.zeros((2, len(context.graph.resolved.classes)))
        for slot in norm_slots(context):
            weights, holding = torch.from_numpy(norm_values(context, slot)), context.holding(slot)
            for number, entries in holding.entries().items():
                chosen = np.flatnonzero(holding.counts == number)
                distances = squared_distances(weights[torch.from_numpy(entries)])
                total[holding.classes[chosen]] += _shares(context, holding, chosen, distances)
            count[holding.classes] += 1
        context.check_scored(count > 0, "pass no batch norm, which importance='bn_similarity' looks at")
        return total / np.maximum(count, 1)
