# SPDX-License-Identifier: Apache-2.0
"""Runs a recorded graph on channel labels: one rule per operator, work per operator, not per element."""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from fxslim.graph.computed_layers import find_fixed_layers
from fxslim.graph.conflicts import Conflict, Decisions
from fxslim.graph.labels import FIXED, Ids, Labels, LabelSpace, along, compressed, fixed
from fxslim.graph.recording import Recording, named_states
from fxslim.graph.size_checks import SizeCheck
from fxslim.graph.slots import LayerCall, Slot, SlotKey, owner
from fxslim.graph.tagged_sizes import Expression
from fxslim.graph.weight_norms import find_weight_norms

Rule = Callable[["Propagation", fx.Node], Labels | list[Labels]]
RULES: dict[str, Rule] = {}

# Parameters used directly are labelled entry by entry up to this size: labels must stay small beside the model.
MOST_ENTRIES = 2**22


# Operators whose result has the labels of what they are done to, so that a change in place leaves a view's base right.
ELEMENTWISE: set[str] = set()


def rule(*names: str, elementwise: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of ATen operators, by the name without overload and trailing underscore."""
    if elementwise:
        ELEMENTWISE.update(names)

    def register(function: Rule) -> Rule:
        for name in names:
            assert RULES.setdefault(name, function) is function, f"{name} has two rules"
        return function

    return register


def as_int(value: object) -> int:
    """A recorded integer argument."""
    assert isinstance(value, int), value
    return int(value)


def as_node(value: object) -> fx.Node:
    """A recorded tensor argument."""
    assert isinstance(value, fx.Node), value
    return value


def operator_name(node: fx.Node) -> str:
    """``relu`` for aten.relu_.default."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return name.rstrip("_")


def _is_transposed(node: fx.Node) -> bool:
    """Whether a value is a matrix with its two dims exchanged, however the code wrote that."""
    if operator_name(node) not in ("t", "transpose", "permute", "numpy_T") or len(node.meta["shape"]) > 2:
        return False
    return bool(node.meta["stride"] == as_node(node.args[0]).meta["stride"][::-1])


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """How a view moved labels: sizes of the spread labels before (``full``) and after, and its runs.

    A run has the old dims, the new dims that share their elements, and which of those shrinks.
    """

    full: tuple[int, ...]
    whole: tuple[int, ...]
    runs: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Entries of a labelled dim that a split, slice or select takes."""

    dim: int
    start: int
    stop: int


class Propagation:
    """What a rule works with: labels of the values so far, the label space, slots and costs."""

    def __init__(self, model: nn.Module, decisions: Decisions | None = None) -> None:
        self.decisions = decisions or Decisions()
        self.space = LabelSpace()
        self.slots: dict[tuple[str, int], Slot] = {}
        self.calls: list[LayerCall] = []
        self.states: dict[str, Tensor] = dict(named_states(model))
        self.values: dict[fx.Node, Labels | list[Labels]] = {}
        self.reached: set[str] = set()
        self.batch = 0
        self.input_sizes: set[int] = set()
        self.modules = dict(model.named_modules())
        # Views that split channels in rows with a choice of their own, and what is needed to follow that choice.
        self.splits: dict[fx.Node, Ids] = {}
        self.reshapes: dict[fx.Node, Reshape] = {}
        self.parts: dict[fx.Node, Part] = {}
        self.uses: list[tuple[fx.Node, SlotKey | None, Ids, int]] = []
        self.checks: list[SizeCheck] = []
        # Views that make heads of which whole ones go, and labels of heads that get narrower.
        self.heads: dict[fx.Node, Ids] = {}
        self.narrower: list[Ids] = []
        # Labels along the first dim whose size was read from these attributes alone.
        self.widths: dict[Expression, Ids] = {}
        # Rows that turned out to be reduced or mixed with each other, heads whose width is looked at.
        self.wishes: list[Conflict] = []
        # States whose first rows, with these labels, are divided by the square root of how many are kept.
        self.root_scaled: dict[str, Ids] = {}
        self._node: fx.Node | None = None
        # Labels of each entry of parameters that the forward uses directly along several dims.
        self.entries: dict[str, Ids] = {}
        # Masks of weights, which are cut with them.
        self.masks: dict[str, list[str]] = {}
        # Why states stay whole, and why layers do whose weights are computed from others.
        self.whole: dict[str, str] = {}
        self.computed = find_fixed_layers(model)
        # Gains of weights under weight norm, by the weight's direction and dim; None where there is one for all.
        self.gains = {norm.direction: (norm.gain, norm.dim) for norm in find_weight_norms(model)}
        for name in self.states:
            if (layer := owner(name)) in self.computed:
                self._keep_whole(name, self.computed[layer])

    # --- what rules read

    def labels(self, value: Any) -> Labels | None:
        """Labels of an argument; a parameter used directly gets one label for each of its entries."""
        if not isinstance(value, fx.Node):
            return None
        found = self.values.get(value)
        if found is None:
            found = self._direct_state(value) if value.op == "get_attr" else fixed(value.meta["shape"])
            self.values[value] = found
        if isinstance(found, list):
            raise TypeError(f"{value} has several results")
        return found

    def _direct_state(self, node: fx.Node) -> Labels:
        name, shape = str(node.target), node.meta["shape"]
        long = [d for d, size in enumerate(shape) if size > 1]
        if len(long) == 1:
            return along(shape, long[0], self.slot(name, long[0]).ids)
        if not long or name in self.whole or name in self.gains or math.prod(shape) > MOST_ENTRIES:
            self.freeze_state(name, node, f"{name} is a parameter used directly")
            return fixed(shape)
        self.reached.add(name)
        if name not in self.entries:
            self.entries[name] = self.space.fresh(math.prod(shape)).reshape(shape)
        self.entries |= dict.fromkeys(self.masks.get(name, ()), self.entries[name])
        return Labels(shape=shape, ids=self.entries[name])

    def state_name(self, value: Any) -> str | None:
        """The name of the parameter or buffer that an argument is, or is a transposed view of."""
        while isinstance(value, fx.Node) and value.op == "call_function" and _is_transposed(value):
            value = value.args[0]
        return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None

    def tied_along(self, labels: Labels, dim: int) -> Labels:
        """The labels with one channel along all other dims, where they vary along ``dim`` at all."""
        if dim not in labels.varying or len(labels.varying) == 1:
            return labels
        line = labels.ids[tuple(slice(None) if d == dim else slice(1) for d in range(labels.ids.ndim))]
        self.space.unify(np.broadcast_to(line, labels.ids.shape), labels.ids)
        return Labels(shape=labels.shape, ids=line)

    def slots_of(self, ids: Ids) -> tuple[tuple[str, int], ...]:
        """Where the first of these labels lives so far."""
        label = ids.reshape(-1)[0]
        return tuple(key for key, slot in self.slots.items() if label in slot.ids)

    def has_computed(self, values: Iterable[Any]) -> bool:
        """Whether any of these arguments is a tensor that the model computes, not a parameter or buffer."""
        return any(isinstance(value, fx.Node) and self.state_name(value) is None for value in values)

    # --- what rules write

    def why_computed(self, node: fx.Node, what: str) -> str:
        """Why a tensor is not a parameter: its layer's weights are made from others, or the model computes it."""
        return self.computed.get(node.meta["module"], f"{what} is computed")

    def slot(self, name: str, dim: int, ids: Ids | None = None, *, blocks: int = 1, role: str = "follower") -> Slot:
        """The slot of a dim: made at its first use (with fresh labels unless given), unified at later ones."""
        self.reached.add(name)
        slot = self.slots.get((name, dim))
        if slot is None:
            ids = self.space.fresh(blocks * self.states[name].shape[dim]) if ids is None else np.array(ids)
            slot = self.slots[name, dim] = Slot(name=name, dim=dim, ids=ids, blocks=blocks, role=role)
        elif ids is not None:
            self.space.unify(slot.ids, ids)
        if self._node is not None:
            self.uses.append((self._node, slot.key, slot.ids if ids is None else ids, blocks))
        for mask in self.masks.get(name, ()):
            self.slot(mask, dim, slot.ids if ids is None else ids, blocks=blocks)
        if name in self.gains:
            self._follow_gain(slot)
        return slot

    def _follow_gain(self, slot: Slot) -> None:
        """The gain of a weight loses the entries that the weight loses along its dim."""
        gain, dim = self.gains[slot.name]
        self.reached.add(gain)
        if dim == slot.dim and slot.blocks == 1:
            self.slot(gain, dim, slot.ids)
        elif dim == slot.dim:
            self.space.freeze(slot.ids, f"{gain} has one entry for inputs of all groups")

    def group(self, node: fx.Node, line: Ids, groups: int, reason: str) -> None:
        """An operator works on groups of channels: equally many stay in each, and none changes its group."""
        self.space.balance(line.reshape(groups, -1), reason)
        self.uses.append((node, None, line, groups))

    def count(
        self, node: fx.Node, weight: str | fx.Node, batch: int, positions: int, factors: tuple[SlotKey, ...] = ()
    ) -> None:
        """Note the cost of a layer that multiplies its weight at so many positions of the whole batch.

        A weight that is no parameter, such as one that is quantized in each forward, is the node that makes it.
        """
        if self.batch == 0:
            # The first layer tells which size is the batch; an unbatched one has none.
            self.batch = max(1, batch) if batch in self.input_sizes else 1
            self.calls = [replace(call, macs=call.macs // self.batch) for call in self.calls]
        if isinstance(weight, str):
            own, shape = owner(weight), tuple(self.states[weight].shape)
        else:
            own, shape = "the model's forward", weight.meta["shape"]
        name, total = node.meta["module"] or own, positions * math.prod(shape)
        self.calls.append(LayerCall(name=name, macs=total // self.batch, factors=factors))

    def tie_rows(self, node: fx.Node, labels: Labels, dim: int) -> bool:
        """Ask that rows which keep their number lose the same entries; False where the dim has no such rows."""
        return self.space.keeps_rows(labels, dim) and self.tie_views(node, labels)

    def tie_views(self, node: fx.Node, labels: Labels) -> bool:
        """Ask that the rows of the views that these labels come from lose the same entries; False if there are none."""
        views = frozenset(view for view, rows in self.splits.items() if np.isin(rows, labels.ids).any())
        if views:
            self.wishes.append(Conflict(reason=f"{operator_name(node)} mixes rows of channels", tied=views))
        return bool(views)

    def narrow_heads(self, node: fx.Node, labels: Labels, beside: Labels | None = None) -> bool:
        """Ask that heads stay and get narrower, all alike; False where the labels are no heads of which whole ones go.

        ``beside``: only where those that they meet got narrower, or have no labels at all.
        """
        if beside is not None and beside.labelled and not any(np.isin(i, beside.ids).any() for i in self.narrower):
            return False
        views = frozenset(view for view, ids in self.heads.items() if np.isin(ids, labels.ids).any())
        if views:
            self.wishes.append(Conflict(reason=f"{operator_name(node)} is shared by all heads", narrow=views))
        return bool(views)

    def freeze(self, labels: Labels | None, node: fx.Node, why: str) -> None:
        if labels is not None and labels.labelled:
            where = node.meta.get("module") or "the model's forward"
            self.space.freeze(labels.ids, f"{why} in {where}")

    def freeze_inputs(self, node: fx.Node, why: str) -> list[Labels] | Labels:
        """Give up on an operator: what it reads stays whole, what it makes has no channels."""
        for value in node.all_input_nodes:
            if value.op == "get_attr":
                self.freeze_state(str(value.target), node, why)
            elif not isinstance(self.values.get(value), list):
                self.freeze(self.labels(value), node, why)
        return results_without_channels(node)

    def freeze_state(self, name: str, node: fx.Node, why: str) -> None:
        """A parameter stays whole."""
        where = node.meta.get("module") or "the model's forward"
        self._keep_whole(name, f"{why} in {where}")

    def _keep_whole(self, name: str, reason: str) -> None:
        self.reached.add(name)
        self.whole.setdefault(name, reason)
        if name in self.entries:
            self.space.freeze(self.entries[name], reason)
        for dim in range(self.states[name].dim()):
            if (name, dim) in self.slots:
                self.space.freeze(self.slots[name, dim].ids, reason)
            else:
                zeros = np.full(self.states[name].shape[dim], FIXED, dtype=np.int64)
                self.slots[name, dim] = Slot(name=name, dim=dim, ids=zeros)

    # --- the walk

    def run(self, recording: Recording) -> None:
        """Labels of every value of a recording; a second recording of the same model adds to the first."""
        self.input_sizes = {size for node in recording.inputs for size in node.meta["shape"][:2]}
        self.batch = 0
        self._take_masks(recording)
        for node in recording.nodes:
            if node.op == "call_function":
                made = self._labels_after(node)
                if node in self.decisions.single and isinstance(made, Labels):
                    self.freeze(made, node, "one head is shared by all queries, whose heads go")
                    made = fixed(made.shape)
                self.values[node] = made
        self._node = None
        for node, reason in self.decisions.whole.items():
            value = self.values.get(node)
            if isinstance(value, Labels):
                self.freeze(value, node, reason)
        found = self.space.freezes
        self.space.freezes = []
        for node in recording.outputs:
            self.freeze(self.labels(node), node, "model output")
        # Said first: nothing can lift it.
        self.space.freezes += found

    def _take_masks(self, recording: Recording) -> None:
        """Masks follow their weights; one that the forward looks at besides can't, and both stay."""
        used = {str(n.target) for n in recording.nodes if n.op == "get_attr" and n.users and n not in recording.weights}
        for direction, (gain, _) in self.gains.items():
            for name in {gain, direction} & used:
                for state in (gain, direction):
                    self._keep_whole(state, f"the forward uses {name} besides the weight that is made of it")
        for mask, weight in recording.masks.items():
            if mask in used or mask in self.whole:
                for name in (mask, weight):
                    self._keep_whole(name, f"{mask} masks {weight}, and the forward uses it besides")
                continue
            found = self.masks.setdefault(weight, [])
            if mask not in found:
                found.append(mask)
                for slot in [slot for slot in self.slots.values() if slot.name == weight]:
                    self.slot(mask, slot.dim, slot.ids, blocks=slot.blocks)

    def _labels_after(self, node: fx.Node) -> Labels | list[Labels]:
        if node.target is operator.getitem:
            source, index = self.values[as_node(node.args[0])], as_int(node.args[1])
            return source[index] if isinstance(source, list) else source
        name, self._node = operator_name(node), node
        if node.meta["mutates_view"] and name not in ELEMENTWISE:
            return self.freeze_inputs(node, f"{name} changes a view in place")
        if name not in RULES:
            return self.freeze_inputs(node, f"operator {name} has no rule")
        return RULES[name](self, node)


def results_without_channels(node: fx.Node) -> Labels | list[Labels]:
    """FIXED labels for one result, or for each of several."""
    if node.meta.get("shape") is not None:
        return fixed(node.meta["shape"])
    items = [user for user in node.users if user.target is operator.getitem]
    several: list[Labels] = [fixed(())] * (1 + max((as_int(i.args[1]) for i in items), default=0))
    for item in items:
        several[as_int(item.args[1])] = fixed(item.meta["shape"])
    return several


def combined(propagation: Propagation, node: fx.Node, operands: list[Labels], shape: tuple[int, ...]) -> Labels:
    """Labels of an elementwise result: those of its operands, unified where both have them."""
    aligned = [_aligned(operand, len(shape)) for operand in operands]
    chosen: Labels | None = None
    for operand in aligned:
        if not operand.varying:
            # One label for all elements, such as a single selected channel: it can't be told apart.
            propagation.freeze(operand, node, "a single channel meets all others")
        elif chosen is None:
            chosen = operand
        elif set(operand.varying) <= set(chosen.varying) or set(operand.varying) >= set(chosen.varying):
            # Where one is constant along more dims, so is the result: its channels go as a whole.
            propagation.space.unify(chosen.ids, operand.ids)
            chosen = min(chosen, operand, key=lambda labels: len(labels.varying))
        elif propagation.narrow_heads(node, chosen, operand) or propagation.narrow_heads(node, operand, chosen):
            # Whole heads of one meet entries of the heads of the other: runs again with narrower heads.
            return fixed(shape)
        else:
            propagation.freeze(operand, node, "channels along different dims meet")
            if any(operand.shape[d] > 1 for d in chosen.varying):
                propagation.freeze(chosen, node, "channels along different dims meet")
                return fixed(shape)
    if chosen is None:
        return fixed(shape)
    for operand in aligned:
        # One that is a single label over several entries was frozen above: those entries stay.
        if not operand.varying and any(
            operand.shape[d] > 1 and not propagation.space.keeps_rows(chosen, d) for d in chosen.varying
        ):
            propagation.freeze(chosen, node, "combined with values that are no channels")
    return compressed(Labels(shape=shape, ids=chosen.ids))


def _aligned(labels: Labels, rank: int) -> Labels:
    missing = rank - len(labels.shape)
    ones = (1,) * missing
    return Labels(shape=ones + labels.shape, ids=labels.ids.reshape(ones + labels.ids.shape))
