# SPDX-License-Identifier: Apache-2.0
"""FPGM: a filter near to all others can be replaced by them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxslim.pruning.importance.aggregation import SlotValue, WeightImportance
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.distances import class_vectors, squared_distances


@dataclass(frozen=True, kw_only=True)
class FPGM(WeightImportance):
    """The sum of Euclidean distances to all other filters of the layer (those of as many entries)."""

    name: ClassVar[str] = "fpgm"

    def slot_values(self, context: Context) -> Iterator[SlotValue]:
        """Sums of distances."""
        for slot in self.slots(context):
            values = np.zeros(len(context.holding(slot).classes))
            for chosen, vectors in class_vectors(context, slot):
                values[chosen] = np.sqrt(squared_distances(vectors)).sum(1)
            yield SlotValue(slot=slot, values=values, grows=False)
