# SPDX-License-Identifier: Apache-2.0
"""Labels: which channel every element of an activation belongs to, in O(channels).

An activation's labels are a small integer array: one entry where they are constant along a dim, full
length where they differ. Label 0 (FIXED) is "not a channel". Rules unify labels; at the end the
classes of the union are the channels that can only be removed together.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

FIXED = 0


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels of a tensor of this shape; ``ids`` has its rank, and size 1 where labels are constant.

    A feature map (2, 3, 8, 8) whose channels are labelled 5, 6, 7: ids of shape (1, 3, 1, 1).
    """

    shape: tuple[int, ...]
    ids: Ids

    @property
    def varying(self) -> list[int]:
        """Dims along which labels differ."""
        return [d for d, size in enumerate(self.ids.shape) if size > 1]

    @property
    def labelled(self) -> bool:
        return bool(self.ids.any())

    def vector(self, dim: int) -> Ids:
        """Labels along one dim, at full length; only for labels that vary along no other."""
        line = self.ids.reshape(-1)
        return np.broadcast_to(line, (self.shape[dim],)) if line.size == 1 else line

    def line(self, dim: int) -> Ids:
        """Labels along one dim at the first place of all others; it has as many kept entries as any other place."""
        return np.moveaxis(self.ids, dim, -1).reshape(-1, self.ids.shape[dim])[0]


def fixed(shape: tuple[int, ...]) -> Labels:
    """Labels of a tensor without channels."""
    return Labels(shape=shape, ids=np.zeros((1,) * len(shape), dtype=np.int64))


def along(shape: tuple[int, ...], dim: int, line: Ids) -> Labels:
    """Labels that vary along one dim."""
    size = [1] * len(shape)
    size[dim] = len(line)
    return compressed(Labels(shape=shape, ids=np.asarray(line).reshape(size)))


def compressed(labels: Labels) -> Labels:
    """The same labels with size 1 wherever they are constant; where there are no entries there are no channels."""
    ids = labels.ids
    if not ids.size:
        return fixed(labels.shape)
    for d in range(ids.ndim):
        if ids.shape[d] > 1:
            first = ids.take([0], axis=d)
            if (ids == first).all():
                ids = first
    return Labels(shape=labels.shape, ids=ids)


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """Labels that can't be removed, and why."""

    ids: Ids
    reason: str


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The rows of ``rows`` must keep equally many entries each; the entries are free otherwise."""

    rows: Ids
    reason: str

    @cached_property
    def lowest(self) -> int:
        return int(self.rows.min())

    @cached_property
    def highest(self) -> int:
        return int(self.rows.max())


@dataclass(kw_only=True)
class LabelSpace:
    """All labels of a graph: what is one channel with what, what is frozen, what must stay balanced."""

    count: int = 1
    edges: list[tuple[Ids, Ids]] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    balances: list[Balance] = field(default_factory=list)

    def fresh(self, size: int) -> Ids:
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def unify(self, a: Ids, b: Ids) -> None:
        a, b = np.broadcast_arrays(a, b)
        if a is not b:
            differ = a != b
            if differ.any():
                self.edges.append((a[differ], b[differ]))

    def freeze(self, ids: Ids, reason: str) -> None:
        ids = ids[ids != FIXED]
        if ids.size:
            self.freezes.append(Freeze(ids=ids.reshape(-1), reason=reason))

    def balance(self, rows: Ids, reason: str) -> None:
        if rows.shape[0] > 1:
            self.balances.append(Balance(rows=rows, reason=reason))

    def keeps_rows(self, labels: Labels, dim: int) -> bool:
        """Whether a dim holds rows of a balance: it never gets shorter."""
        lines = np.moveaxis(labels.ids, dim, 0).reshape(labels.ids.shape[dim], -1)
        balances = [b for b in self.balances if b.lowest <= lines[0, 0] <= b.highest] if lines.shape[1] > 1 else []
        if not balances:
            return False
        # Behind a merge with the batch they repeat.
        lines = np.stack(list({line.tobytes(): line for line in lines}.values()))
        return any(_are_rows(lines, balance.rows) for balance in balances)

    def classes(self) -> Ids:
        """The smallest label of each label's class (connected components by hooking and jumping)."""
        parent = np.arange(self.count, dtype=np.int64)
        if not self.edges:
            return parent
        a = np.concatenate([e[0].reshape(-1) for e in self.edges])
        b = np.concatenate([e[1].reshape(-1) for e in self.edges])
        while True:
            low_a, low_b = parent[a], parent[b]
            open_edges = low_a != low_b
            if not open_edges.any():
                return parent
            a, b, low_a, low_b = a[open_edges], b[open_edges], low_a[open_edges], low_b[open_edges]
            np.minimum.at(parent, np.maximum(low_a, low_b), np.minimum(low_a, low_b))
            while True:
                jumped = parent[parent]
                if (jumped == parent).all():
                    break
                parent = jumped


def _are_rows(lines: Ids, rows: Ids) -> bool:
    """Whether each line is made of whole rows, and lines that differ have no row in common."""
    lines = np.unique(lines, axis=0)
    flat = rows.reshape(-1)
    order = np.argsort(flat, kind="stable")
    found = order[np.searchsorted(flat, lines.reshape(-1), sorter=order).clip(max=flat.size - 1)]
    if not np.array_equal(flat[found], lines.reshape(-1)) or len(np.unique(lines)) != lines.size:
        return False
    row_of = (found // rows.shape[1]).reshape(lines.shape)
    held = np.unique(row_of)
    if held.size * rows.shape[1] != lines.size:
        return False
    return all(set(row_of[i].tolist()).isdisjoint(row_of[i + 1 :].reshape(-1).tolist()) for i in range(len(row_of)))
