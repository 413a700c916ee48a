# SPDX-License-Identifier: Apache-2.0
"""Masked weights that read channels: which of their blocks of m neighbours hold channels of a set."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.graph.groups import ResolvedLabels
from fxslim.graph.labels import Ids
from fxslim.graph.slots import Slot
from fxslim.graph.surgery.cutting import Cut, cut_tensor
from fxslim.patterns import NM
from fxslim.patterns.weight_layout import WeightLayout, layout_of
from fxslim.sparsity.mask_choice import Weight, seen_by_weight
from fxslim.sparsity.methods import Method, Wanda


@dataclass(kw_only=True)
class Reader:
    """The scores of a masked weight in the order so far, and where it has its inputs."""

    slot: Slot
    classes: Ids
    pattern: NM
    layout: WeightLayout
    scores: Tensor

    def kept(self, cut: Cut | None = None) -> float:
        """The sum of the scores that the pattern keeps, after a cut of the inputs."""
        rows = self.layout.rows(self.scores if cut is None else cut_tensor(self.scores, [cut]))
        return float(rows[self.pattern.mask(rows)].sum(dtype=torch.float64))

    def views(self, channels: Ids) -> list["View"]:
        """One for each time that the weight reads these channels; none for the blocks of a grouped convolution."""
        if self.layout.groups > 1:
            return []
        rows = self.layout.rows(self.scores).movedim(1, -1).flatten(0, -2)
        places = np.flatnonzero(np.isin(self.classes, channels))
        ordered = places[np.argsort(self.classes[places], kind="stable")].reshape(len(channels), -1)
        return [View(rows=rows, columns=columns, n=self.pattern.n, m=self.pattern.m) for columns in ordered.T]


@dataclass(frozen=True, kw_only=True)
class View:
    """Columns of a matrix, one for each channel of a set."""

    rows: Tensor
    columns: Ids
    n: int
    m: int

    @property
    def blocks(self) -> Ids:
        """For each channel its block of m neighbours, by the block's first channel; -1 where others are in it."""
        _, first, inverse, counts = np.unique(
            self.columns // self.m, return_index=True, return_inverse=True, return_counts=True
        )
        return np.where(counts[inverse] == self.m, first[inverse], -1)


def input_scores(model: nn.Module, patterns: Mapping[str, NM], method: Method, data: Data | None) -> dict[str, Tensor]:
    """What the method gives each entry of these weights; by Wanda where it would look at products of inputs."""
    own = Wanda() if method.needs == "products" else method
    weights = {name: Weight(model, name) for name in patterns}
    for weight in weights.values():
        weight.check()
    found = {}
    for some, seen in seen_by_weight(model, weights, own, data):
        for name in some:
            scores = own.scores(weights[name].rows(), seen[name], patterns[name])
            found[name] = weights[name].layout.restored(scores).float().cpu()
    return found


def find_readers(
    model: nn.Module, resolved: ResolvedLabels, patterns: Mapping[str, NM], scores: Mapping[str, Tensor]
) -> list[Reader]:
    """The masked weights that read channels of the graph."""
    return [
        Reader(
            slot=slot,
            classes=resolved.of(slot),
            pattern=patterns[slot.name],
            layout=layout_of(model.get_submodule(slot.name.rpartition(".")[0])),
            scores=scores[slot.name],
        )
        for slot in resolved.slots
        if slot.role == "consumer" and slot.name in patterns
    ]
