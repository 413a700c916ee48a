# SPDX-License-Identifier: Apache-2.0
"""The order in which kept channels lie in memory behind views that split them in rows (channel shuffle).

Everywhere else kept channels keep their order. Where a view splits channels in rows that lose different
entries, place j of a row holds its j-th *kept* entry; transposed and merged again, the channels lie in an
order that depends on the choice. This walks those values only, and finds the order for each parameter behind.
"""

import math
import operator
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxslim.graph.labels import Ids, Labels
from fxslim.graph.propagation import Propagation, as_int, as_node, operator_name
from fxslim.graph.recording import Recording
from fxslim.graph.rules.movement import permuted_axes
from fxslim.graph.slots import SlotKey

# A vector that a parameter's dim follows at one operator: (slot, labels, blocks); no slot: only the blocks must hold.
Use = tuple[SlotKey | None, Ids, int]

PERMUTING = frozenset(["permute", "transpose", "t", "numpy_T"])
RESHAPING = frozenset("unsqueeze squeeze view _unsafe_view reshape _reshape_alias flatten unflatten".split())
PARTING = frozenset(
    "split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind slice narrow select".split()
)


# These move channels in one step: behind another shuffle they are given up.
SHUFFLING = frozenset(["channel_shuffle", "native_channel_shuffle"])


@dataclass(frozen=True, kw_only=True)
class Misorder:
    """A value whose channels would have to lie in two different orders, and the views that could cause it."""

    node: fx.Node
    splits: frozenset[fx.Node]


class KeptOrder:
    """Layouts of the values whose kept channels are out of order, and ``slots``: the order of parameter dims.

    A layout has the pruned value's size along the dims where labels differ and 1 along all others; its entries
    are flat positions in the value's labels.
    """

    def __init__(self, propagation: Propagation, classes: Ids, keep: np.ndarray) -> None:
        self.propagation, self.classes = propagation, classes
        self.kept_label = keep[classes]
        self.layouts: dict[fx.Node, Ids] = {}
        self.sources: dict[fx.Node, frozenset[fx.Node]] = {}
        self.slots: dict[SlotKey, tuple[int, ...]] = {}

    def run(self, recordings: list[Recording]) -> Misorder | None:
        """Find all orders; the first place where they contradict each other, if any."""
        uses: dict[fx.Node, list[Use]] = {}
        for node, *use in self.propagation.uses:
            uses.setdefault(node, []).append(tuple(use))  # type: ignore[arg-type]
        for recording in recordings:
            for node in recording.nodes:
                if node.op == "call_function" and not self._step(node, uses.get(node, [])):
                    return Misorder(node=node, splits=self._splits_before(node))
            for node in recording.outputs:
                if node in self.layouts:
                    return Misorder(node=node, splits=self.sources[node])
        for node, key, line, blocks in self.propagation.uses:
            if key is not None and key in self.slots and self._order_at(node, line, blocks) != self.slots[key]:
                return Misorder(node=node, splits=frozenset().union(*self.sources.values()))
        return None

    def _splits_before(self, node: fx.Node) -> frozenset[fx.Node]:
        before = [self.sources.get(value, frozenset()) for value in (*node.all_input_nodes, *_source(node))]
        own = frozenset([node]) if node in self.propagation.splits else frozenset()
        return own.union(*before)

    # --- one value

    def _step(self, node: fx.Node, uses: list[Use]) -> bool:
        inputs = [*node.all_input_nodes, *_source(node)]
        odd = [value for value in inputs if value in self.layouts]
        if not odd and node not in self.propagation.splits:
            return True
        for key, line, blocks in uses:
            order = self._order_at(node, line, blocks)
            if order is None or (key is not None and self.slots.setdefault(key, order) != order):
                return False
        labels = self.propagation.values.get(node)
        if not isinstance(labels, Labels) or not labels.labelled:
            return True
        layout = self._layout(node, labels, inputs, odd)
        if layout is None:
            return False
        moved = layout.size and not np.array_equal(layout.reshape(-1), self._natural(labels))
        if moved or len(labels.varying) > 1:
            self.layouts[node], self.sources[node] = layout, self._splits_before(node)
        return True

    def _layout(self, node: fx.Node, labels: Labels, inputs: list[fx.Node], odd: list[fx.Node]) -> Ids | None:
        """The layout of a value; None where it contradicts; empty where its channels are new ones."""
        name = "getitem" if node.target is operator.getitem else operator_name(node)
        if name in PERMUTING:
            return self._permuted(node)
        if name in RESHAPING:
            return self._reshaped(node, labels)
        if name in PARTING or (name == "getitem" and operator_name(as_node(node.args[0])) in PARTING):
            return self._part(node, labels)
        if name == "cat":
            return self._joined(node, labels)
        if name in SHUFFLING:
            return None
        if not np.isin(labels.ids, np.concatenate([self._ids(value).reshape(-1) for value in odd])).any():
            return np.zeros(0, dtype=np.int64)
        if name in ("bmm", "baddbmm"):
            # The other factor has no channels, or some that stay.
            inputs = [value for value in inputs if self._ids(value).size == labels.ids.size]
        return self._same(labels, [value for value in inputs if self._ids(value).size > 1])

    def _same(self, labels: Labels, operands: list[fx.Node]) -> Ids | None:
        """The common layout of operands that meet entry by entry, along the result's dims."""
        first: Ids | None = None
        for value in sorted(operands, key=lambda v: v.op == "get_attr"):
            if not np.array_equal(self._classes(self._ids(value)), self._classes(labels.ids)):
                # Other sizes, or an operator that moves channels by itself.
                return None
            if value.op == "get_attr" and first is not None:
                # A parameter lies as it is needed.
                dim = self._ids(value).shape.index(labels.ids.size)
                order = tuple(first.reshape(-1).tolist())
                if self.slots.setdefault((str(value.target), dim), order) != order:
                    return None
                continue
            layout = self._layout_of(value)
            line = layout.reshape([layout.shape[d] for d, size in enumerate(self._ids(value).shape) if size > 1])
            if first is not None and not np.array_equal(first, line):
                return None
            first = line
        if first is None or first.ndim != len(labels.varying):
            return None
        sizes = [1] * len(labels.shape)
        for d, size in zip(labels.varying, first.shape, strict=True):
            sizes[d] = size
        return first.reshape(sizes)

    def _permuted(self, node: fx.Node) -> Ids:
        x = as_node(node.args[0])
        before, layout = self._ids(x), self._layout_of(x)
        order = permuted_axes(node, before.ndim)
        places = np.unravel_index(layout.transpose(order), before.shape)
        shape = tuple(before.shape[d] for d in order)
        return np.ravel_multi_index(tuple(places[d] for d in order), shape)

    def _reshaped(self, node: fx.Node, labels: Labels) -> Ids | None:
        """What the view does, done to the kept entries."""
        x = as_node(node.args[0])
        ids, layout = self._ids(x), self._layout_of(x)
        how = self.propagation.reshapes[node]
        places = list(np.unravel_index(layout, ids.shape))
        sizes = list(layout.shape)
        for d, size in enumerate(how.full):
            if ids.shape[d] == 1 and size > 1:
                sizes[d] = size
                places[d] = np.arange(size).reshape([size if e == d else 1 for e in range(len(how.full))])
        flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*places)), how.full)
        new = list(how.whole)
        for before, after, shrinking in how.runs:
            total, rest = math.prod(sizes[d] for d in before), math.prod(how.whole[d] for d in after if d != shrinking)
            if total % rest:
                return None
            new[shrinking] = total // rest
        out = list(np.unravel_index(flat.reshape(new), how.whole))
        for d, size in enumerate(labels.ids.shape):
            if size == 1 and how.whole[d] > 1:
                out = [place.take([0], axis=d) for place in out]
                out[d] = np.zeros_like(out[d])
        fixed = [d for _, after, shrinking in how.runs for d in after if d != shrinking and labels.ids.shape[d] > 1]
        return np.ravel_multi_index(tuple(out), labels.ids.shape) if _in_place(out, fixed) else None

    def _part(self, node: fx.Node, labels: Labels) -> Ids | None:
        """The entries from one place to another along a dim."""
        owner = as_node(node.args[0]) if node.target is operator.getitem else node
        x = as_node(owner.args[0])
        ids, layout = self._ids(x), self._layout_of(x)
        part = self.propagation.parts.get(node)
        if part is None:
            return self._same(labels, [x])
        dim, first, last = part.dim, part.start, part.stop
        if layout.shape[dim] < ids.shape[dim]:
            kept = np.moveaxis(self.kept_label[ids], dim, 0).reshape(ids.shape[dim], -1)[:, 0]
            first, last = int(kept[:first].sum()), int(kept[:last].sum())
        places = list(np.unravel_index(layout.take(range(first, last), axis=dim), ids.shape))
        places[dim] = places[dim] - part.start
        if not ((places[dim] >= 0) & (places[dim] < part.stop - part.start)).all():
            return None
        if len(labels.ids.shape) < ids.ndim:
            del places[dim]
            places = [place.squeeze(dim) for place in places]
        return np.ravel_multi_index(tuple(places), labels.ids.shape)

    def _joined(self, node: fx.Node, labels: Labels) -> Ids | None:
        """One after the other along the only dim where labels differ."""
        parts = [as_node(part) for part in node.args[0]]  # type: ignore[union-attr]
        dim = (as_int(node.args[1]) if len(node.args) > 1 else 0) % len(labels.shape)
        if labels.varying != [dim]:
            return self._same(labels, [part for part in parts if self._ids(part).size > 1])
        lines, offset = [], 0
        for part in parts:
            size = part.meta["shape"][dim]
            line = self._layout_of(part).reshape(-1)
            lines.append(offset + (line if self._ids(part).size > 1 else self._repeated(part, size)))
            offset += size
        shape = [1] * len(labels.shape)
        shape[dim] = -1
        return np.concatenate(lines).reshape(shape)

    def _repeated(self, part: fx.Node, size: int) -> Ids:
        """Positions of a part with one label for all of its entries."""
        return np.arange(size if self.kept_label[self._ids(part).reshape(-1)[0]] else 0)

    # --- what is where

    def _ids(self, value: fx.Node) -> Ids:
        labels = self.propagation.values.get(value)
        return labels.ids if isinstance(labels, Labels) else np.zeros(1, dtype=np.int64)

    def _classes(self, ids: Ids) -> Ids:
        return self.classes[ids.reshape(-1)]

    def _natural(self, labels: Labels) -> Ids:
        return np.flatnonzero(self.kept_label[labels.ids.reshape(-1)])

    def _layout_of(self, value: fx.Node) -> Ids:
        if value in self.layouts:
            return self.layouts[value]
        ids = self._ids(value)
        shape = [-1 if size > 1 else 1 for size in ids.shape]
        kept = np.flatnonzero(self.kept_label[ids.reshape(-1)])
        return kept.reshape(shape) if shape.count(-1) == 1 else kept.reshape(-1, *[1] * (ids.ndim - 1))

    def _order_at(self, node: fx.Node, line: Ids, blocks: int) -> tuple[int, ...] | None:
        """Kept positions of a vector of labels in the order of the operand that carries them."""
        for value in (*node.all_input_nodes, *_source(node)):
            ids = self._ids(value).reshape(-1)
            if value in self.layouts and np.array_equal(ids, line):
                order = self.layouts[value].reshape(-1)
                break
        else:
            order = np.flatnonzero(self.kept_label[line])
        if blocks > 1:
            width, kept = len(line) // blocks, len(order) // blocks
            if len(order) % blocks or (order // width != np.repeat(np.arange(blocks), kept)).any():
                return None
        return tuple(order.tolist())


def _in_place(places: list[Ids], dims: list[int]) -> bool:
    """Whether every entry is in the row where it was, along these dims."""
    for d in dims:
        size = places[d].shape[d]
        rows = np.arange(size).reshape([size if e == d else 1 for e in range(places[d].ndim)])
        if not np.array_equal(places[d], np.broadcast_to(rows, places[d].shape)):
            return False
    return True


def _source(node: fx.Node) -> list[fx.Node]:
    """What an operator with several results read, for one of its results."""
    return list(as_node(node.args[0]).all_input_nodes) if node.target is operator.getitem else []
