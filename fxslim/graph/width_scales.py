# SPDX-License-Identifier: Apache-2.0
"""Numbers computed from widths, kept by scaling a layer before them.

Where a forward divides by the square root of a width, the pruned model would divide by another number than the model
whose removed channels are silent. The weight and bias of a layer whose output goes nowhere else make up for it: a
quotient of degree k in that layer changes by the k-th power of what the layer is multiplied with.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import fx

from fxslim.graph.changed_numbers import changed_operators
from fxslim.graph.labels import FIXED, Ids, Labels
from fxslim.graph.propagation import Propagation, as_node, operator_name
from fxslim.graph.recording import Recording
from fxslim.graph.size_checks import NewSizes
from fxslim.graph.tagged_sizes import TaggedInt, evaluate

# Layers that are a multiple of their weight and bias.
_LAYERS = ("addmm", "mm", "convolution", "embedding")
_MOVING = frozenset(
    """
    permute transpose t numpy_T view _unsafe_view reshape _reshape_alias flatten unflatten squeeze unsqueeze select
    slice narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind expand
    contiguous clone detach alias _to_copy getitem repeat_interleave index_select flip roll
    """.split()
)
# A multiple of what they read, for positive multiples.
_FOLLOWING = _MOVING | frozenset(
    """
    relu neg leaky_relu abs mean sum dropout avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices
    _adaptive_avg_pool2d adaptive_avg_pool1d upsample_bilinear2d upsample_nearest2d
    """.split()
)
# All operands must have the same degree.
_JOINING = frozenset(["add", "sub", "cat", "stack"])
_MULTIPLYING = frozenset(["mul", "bmm", "mm", "div", "baddbmm", "convolution"])


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Entries of one dim of a parameter, before anything is cut, that are multiplied when the channels go."""

    name: str
    dim: int
    entries: tuple[int, ...]
    factor: float


@dataclass(frozen=True, kw_only=True)
class Unkept:
    """A number computed from sizes, at an operator where no layer can make up for its change."""

    node: fx.Node
    sizes: tuple[TaggedInt, ...]


class WidthScales:
    """Finds what must be scaled for one choice of channels."""

    def __init__(self, propagation: Propagation, recordings: list[Recording], sizes: NewSizes) -> None:
        self.propagation = propagation
        self.recordings = recordings
        self.sizes = sizes
        self.values = propagation.values
        self.scalings: list[Scaling] = []
        self.scaled = np.zeros(0, dtype=np.int64)
        # Operators whose number changes, and those that a scaling makes up for.
        self.changed: dict[fx.Node, float | None] = {}
        self.settled: set[fx.Node] = set()
        # Slots with their labels, by the operator that uses them.
        self.uses: dict[fx.Node, list[tuple[tuple[str, int], Ids]]] = {}
        self.made: dict[fx.Node, tuple[str, Ids]] = {}

    def find(self) -> list[Unkept]:
        """Fill ``scalings``; what can't be kept that way."""
        failed: list[Unkept] = []
        for name, ids in self.propagation.root_scaled.items():
            kept = self.sizes.kept_count(ids)
            if kept != ids.size:
                factor, entries = math.sqrt(kept / ids.size), tuple(range(ids.size))
                self.scalings.append(Scaling(name=name, dim=0, entries=entries, factor=factor))
        for recording in self.recordings:
            old = tuple(int(size) for size in recording.numbers)
            new = tuple(evaluate(size.expression, self.sizes.lookup) for size in recording.numbers)
            found = changed_operators(recording, new) if new != old else {}
            if found is None:
                moved = tuple(size for size, a, b in zip(recording.numbers, old, new, strict=True) if a != b)
                return [Unkept(node=recording.outputs[0], sizes=moved)]
            used = (node for node in found if node.users or node in recording.outputs)
            self.changed |= {node: found[node] for node in used}
        if self.changed:
            self._note_uses()
        for node in self.changed:
            if node not in self.settled and not any(self._settle(line) for line in self._candidates(node)):
                failed.append(Unkept(node=node, sizes=()))
        return self._blamed(failed) if failed else []

    def _note_uses(self) -> None:
        propagation = self.propagation
        for node, key, ids, blocks in propagation.uses:
            if key is None:
                continue
            self.uses.setdefault(node, []).append((key, ids))
            if operator_name(node) in _LAYERS and blocks == 1 and propagation.slots[key].role == "producer":
                self.made[node] = key[0], ids

    def _blamed(self, failed: list[Unkept]) -> list[Unkept]:
        """Each with the sizes that change its number, found one by one."""
        nodes, result, moved = {one.node for one in failed}, list[Unkept](), list[TaggedInt]()
        for recording in self.recordings:
            old = tuple(int(size) for size in recording.numbers)
            for expression in dict.fromkeys(size.expression for size in recording.numbers):
                mine = [size.expression == expression for size in recording.numbers]
                new = evaluate(expression, self.sizes.lookup)
                answers = tuple(new if one else value for one, value in zip(mine, old, strict=True))
                if answers == old:
                    continue
                found = changed_operators(recording, answers)
                size = recording.numbers[mine.index(True)]
                moved.append(size)
                for node in nodes.intersection(found) if found is not None else [recording.outputs[0]]:
                    result.append(Unkept(node=node, sizes=(size,)))
        return result or [Unkept(node=failed[0].node, sizes=tuple(moved))]

    # --- layers before an operator

    def _candidates(self, node: fx.Node) -> Iterator[Ids]:
        """Labels of channels that the operator reads, straight from the layers that make them."""
        waiting: list[tuple[fx.Node, tuple[Ids, ...]]] = [(value, ()) for value in node.all_input_nodes]
        seen: set[fx.Node] = set()
        while waiting:
            value, below = waiting.pop(0)
            if value in seen or value.op != "call_function":
                continue
            seen.add(value)
            if value in self.made:
                # What is left of the layer's channels nearest to the operator.
                ids = self.made[value][1]
                narrow = (np.intersect1d(ids, line) for line in below)
                yield next((line for line in narrow if line.any()), np.unique(ids))
            elif _name(value) in _FOLLOWING | _JOINING | _MULTIPLYING:
                labels = self.values.get(value)
                more = (*below, labels.ids[labels.ids != FIXED]) if isinstance(labels, Labels) else below
                waiting += [(before, more) for before in value.all_input_nodes]

    # --- scaling these channels

    def _settle(self, line: Ids) -> bool:
        """Scale these channels where that makes up for all operators that they reach, and changes nothing else."""
        if np.isin(line, self.scaled).any():
            return False
        degrees = _Degrees(self, line)
        for recording in self.recordings:
            if not degrees.run(recording):
                return False
        if any(name in self.propagation.gains for name in degrees.names):
            # Scaling a direction changes nothing.
            return False
        wanted = [-math.log(self.changed[node] or math.nan) / degree for node, degree in degrees.reached.items()]
        if not wanted or max(wanted) - min(wanted) > 1e-12 or not math.isfinite(wanted[0]):
            return False
        places: dict[tuple[str, int], set[int]] = {}
        for maker in degrees.makers:
            for key, ids in self.uses[maker]:
                if key[0] in degrees.names:
                    places.setdefault(key, set()).update(np.flatnonzero(np.isin(ids, line)).tolist())
        self.scalings += [
            Scaling(name=name, dim=dim, entries=tuple(sorted(entries)), factor=math.exp(wanted[0]))
            for (name, dim), entries in places.items()
            if entries
        ]
        self.settled |= degrees.reached.keys()
        self.scaled = np.concatenate([self.scaled, line])
        return True


class _Degrees:
    """Of which degree each value is in some channels of a layer; None while it holds other channels of it too."""

    def __init__(self, scales: WidthScales, line: Ids) -> None:
        self.scales = scales
        self.line = line
        self.makers: dict[fx.Node, int] = {}
        self.names: set[str] = set()
        # Operators whose number changes, with the degree of what they read.
        self.reached: dict[fx.Node, int] = {}

    def run(self, recording: Recording) -> bool:
        """Whether the channels end in operators whose number changes, and nowhere else."""
        degrees: dict[fx.Node, int | None] = {}
        for node in recording.nodes:
            if node.op != "call_function":
                continue
            if self._is_maker(node):
                if any(degrees.get(value, 0) != 0 for value in node.all_input_nodes):
                    return False
                degrees[node] = self._by_labels(node)
                continue
            if all(degrees.get(value, 0) == 0 for value in node.all_input_nodes):
                continue
            degree, follows = self._degree(node, [degrees.get(value, 0) for value in node.all_input_nodes])
            if not follows:
                return False
            if node in self.scales.changed and degree:
                if node in self.scales.settled:
                    return False
                self.reached[node], degree = degree, 0
            degrees[node] = degree
        return all(degrees.get(node, 0) == 0 for node in recording.outputs) and self._used_here_only(recording)

    def _is_maker(self, node: fx.Node) -> bool:
        """Whether an operator makes the channels; its weight and bias are noted."""
        labels, made = self.scales.values.get(node), self.scales.made.get(node)
        if made is None or not isinstance(labels, Labels) or not np.isin(self.line, labels.ids).all():
            return False
        states = self.scales.propagation.states
        self.makers[node] = len(made[1])
        self.names |= {made[0], *(name for (name, _), _ in self.scales.uses[node] if states[name].dim() == 1)}
        return True

    def _used_here_only(self, recording: Recording) -> bool:
        """Whether no other operator reads the weights."""
        waiting = [n for n in recording.nodes if n.op == "get_attr" and n.target in self.names]
        while waiting:
            for user in waiting.pop().users:
                if operator_name(user) in ("t", "transpose", "permute"):
                    waiting.append(user)
                elif user not in self.makers:
                    return False
        return True

    def _by_labels(self, node: fx.Node) -> int | None:
        """1 for a value of these channels, 0 for one without, None where others are beside them or it can't be told."""
        labels = self.scales.values.get(node)
        if not isinstance(labels, Labels):
            return None
        ids = np.unique(labels.ids)
        each = {math.prod(maker.meta["shape"]) // length for maker, length in self.makers.items()}
        # Entries behind one label, or several labels for one entry, would hide others.
        told = (
            FIXED not in ids and math.prod(labels.shape) % len(ids) == 0 and math.prod(labels.shape) // len(ids) in each
        )
        inside = np.isin(ids, self.line)
        if not told or (inside.any() and not inside.all()):
            return None
        return 1 if inside.all() else 0

    def _degree(self, node: fx.Node, before: list[int | None]) -> tuple[int | None, bool]:
        """The degree of a result; False where it is no power of the channels."""
        name = _name(node)
        if node.meta.get("mutates_view"):
            return 0, False
        if None in before:
            mixed = name in _MOVING and len(before) == 1
            return (self._by_labels(node) if mixed else 0), mixed
        known = [degree for degree in before if degree is not None]
        if name in _FOLLOWING:
            return known[0], not any(known[1:])
        if name in _JOINING:
            alike = len(set(known)) == 1 and len(known) == len(_operands(node))
            return known[0], alike
        if name in ("mul", "bmm"):
            squared = node.args[0] is node.args[1]
            return sum(known) * (2 if squared else 1), True
        if name == "mm" or (name == "convolution" and node.args[2] is None):
            return sum(known), True
        if name == "baddbmm" and node.kwargs.get("beta", 1) == 0:
            product = dict(zip(node.all_input_nodes, known, strict=True))
            return product[as_node(node.args[1])] + product[as_node(node.args[2])], True
        if name == "div" and isinstance(node.args[0], fx.Node) and "rounding_mode" not in node.kwargs:
            return known[0] - sum(known[1:]), node.args[0] is not node.args[1]
        return 0, False


def _name(node: fx.Node) -> str:
    return "getitem" if node.target is operator.getitem else operator_name(node)


def _operands(node: fx.Node) -> list[object]:
    """What an operator joins, numbers and repetitions included."""
    return list(node.args[0] if _name(node) in ("cat", "stack") else node.args[:2])  # type: ignore[arg-type]
