# SPDX-License-Identifier: Apache-2.0
"""Runs a recorded graph on channel labels: one rule per operator, work per operator, not per element."""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from fxslim.graph.labels import FIXED, Ids, Labels, LabelSpace, along, compressed, fixed
from fxslim.graph.recording import Recording, named_states
from fxslim.graph.slots import LayerCall, Slot

Rule = Callable[["Propagation", fx.Node], Labels | list[Labels]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of ATen operators, by the name without overload and trailing underscore."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
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


class Propagation:
    """What a rule works with: labels of the values so far, the label space, slots and costs."""

    def __init__(self, model: nn.Module) -> None:
        self.space = LabelSpace()
        self.slots: dict[tuple[str, int], Slot] = {}
        self.calls: list[LayerCall] = []
        self.states: dict[str, Tensor] = dict(named_states(model))
        self.values: dict[fx.Node, Labels | list[Labels]] = {}
        self.reached: set[str] = set()
        self.batch = 0
        self.input_batches: set[int] = set()
        self.modules = dict(model.named_modules())

    # --- what rules read

    def labels(self, value: Any) -> Labels | None:
        """Labels of an argument; a parameter used directly gets one label per entry of its one long dim."""
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
        shape = node.meta["shape"]
        long = [d for d, size in enumerate(shape) if size > 1]
        if len(long) != 1:
            # Entries along several dims (or none): not followed, so it stays and what meets it too.
            self.freeze_state(str(node.target), node, "a parameter used directly")
            return fixed(shape)
        return along(shape, long[0], self.slot(str(node.target), long[0]).ids)

    def state_name(self, value: Any) -> str | None:
        """The name of the parameter or buffer that an argument is, or is a transposed view of."""
        while isinstance(value, fx.Node) and value.op == "call_function" and operator_name(value) == "t":
            value = value.args[0]
        return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None

    def has_computed(self, values: Iterable[Any]) -> bool:
        """Whether any of these arguments is a tensor that the model computes, not a parameter or buffer."""
        return any(isinstance(value, fx.Node) and self.state_name(value) is None for value in values)

    # --- what rules write

    def slot(self, name: str, dim: int, ids: Ids | None = None, *, blocks: int = 1, role: str = "follower") -> Slot:
        """The slot of a dim: made at its first use (with fresh labels unless given), unified at later ones."""
        self.reached.add(name)
        slot = self.slots.get((name, dim))
        if slot is None:
            ids = self.space.fresh(self.states[name].shape[dim]) if ids is None else np.array(ids)
            slot = self.slots[name, dim] = Slot(name=name, dim=dim, ids=ids, blocks=blocks, role=role)
        elif ids is not None:
            self.space.unify(slot.ids, ids)
        return slot

    def count(
        self, node: fx.Node, weight: str, x: Labels, positions: int, factors: tuple[tuple[str, int], ...]
    ) -> None:
        """Note the cost of a layer that multiplies its weight at so many positions of the whole batch."""
        if self.batch == 0:
            # The first layer tells which input has the batch; an unbatched one has none.
            batched = len(x.shape) == self.states[weight].dim() and x.shape[0] in self.input_batches
            self.batch = max(1, x.shape[0]) if batched else 1
        name = node.meta["module"] or weight.rpartition(".")[0]
        total = positions * math.prod(self.states[weight].shape)
        self.calls.append(LayerCall(name=name, macs=total // self.batch, factors=factors))

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
        self.reached.add(name)
        for dim in range(self.states[name].dim()):
            if (name, dim) in self.slots:
                self.freeze(Labels(shape=(), ids=self.slots[name, dim].ids), node, why)
            else:
                zeros = np.full(self.states[name].shape[dim], FIXED, dtype=np.int64)
                self.slots[name, dim] = Slot(name=name, dim=dim, ids=zeros)

    # --- the walk

    def run(self, recording: Recording) -> None:
        """Labels of every value of a recording; a second recording of the same model adds to the first."""
        self.input_batches = {node.meta["shape"][0] for node in recording.inputs if node.meta["shape"]}
        self.batch = 0
        for node in recording.nodes:
            if node.op != "call_function":
                continue
            if node.target is operator.getitem:
                source, index = self.values[as_node(node.args[0])], as_int(node.args[1])
                self.values[node] = source[index] if isinstance(source, list) else source
                continue
            name = operator_name(node)
            if node.meta["mutates_view"]:
                self.values[node] = self.freeze_inputs(node, f"{name} changes a view in place")
            elif isinstance(self.modules.get(node.meta["module"]), nn.MultiheadAttention):
                self.values[node] = self.freeze_inputs(node, "attention keeps its width")
            elif name not in RULES:
                self.values[node] = self.freeze_inputs(node, f"operator {name} has no rule")
            else:
                self.values[node] = RULES[name](self, node)
        for node in recording.outputs:
            self.freeze(self.labels(node), node, "model output")


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
        elif operand.varying == chosen.varying and operand.ids.shape == chosen.ids.shape:
            propagation.space.unify(chosen.ids, operand.ids)
        else:
            for one in (chosen, operand):
                propagation.freeze(one, node, "labels along different dims meet")
            return fixed(shape)
    if chosen is None:
        return fixed(shape)
    for operand in aligned:
        if not operand.labelled and any(operand.shape[d] > 1 for d in chosen.varying):
            propagation.freeze(chosen, node, "combined with values that are no channels")
    return compressed(Labels(shape=shape, ids=chosen.ids))


def _aligned(labels: Labels, rank: int) -> Labels:
    missing = rank - len(labels.shape)
    ones = (1,) * missing
    return Labels(shape=ones + labels.shape, ids=labels.ids.reshape(ones + labels.ids.shape))
