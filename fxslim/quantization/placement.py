# SPDX-License-Identifier: Apache-2.0
"""Where quantizers go: each tensor that is computed with in integers gets one, at the edge of a module.

Tensors that are parts of one another share it. A tensor that one layer alone reads is quantized by that layer; others
where they are made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fxslim.quantization.dataflow import Dataflow, operator_of
from fxslim.quantization.targets import Target


@dataclass
class _Demand:
    """Who needs a tensor on a grid: inputs of layers, by name and place, and other operators."""

    layers: list[tuple[str, int]] = field(default_factory=list)
    operators: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """``inputs``: of layers, {layer: places}; ``outputs``: modules. In both, True where no value is below 0.

    ``given``: layers whose input comes quantized, {layer: the module whose output it is}; None where there are several.
    ``data``: layers of which all inputs are the model's own, and need no gradient.
    """

    given: dict[str, str | None]
    inputs: dict[str, dict[int, bool]]
    outputs: dict[str, bool]
    data: frozenset[str]
    notes: tuple[str, ...] = ()


def place(flow: Dataflow, layers: Mapping[str, bool], target: Target) -> Placement:
    """Quantizers for these layers; those whose value is True have no quantized input."""
    demands: dict[fx.Node, _Demand] = {}

    def demand(node: fx.Node) -> _Demand:
        return demands.setdefault(flow.source(node), _Demand())

    made = []
    for call in flow.recording.calls:
        if call.name in layers and flow.calls_of[call.name] == 1:
            made += [node for node in call.outputs[:1] if flow.is_product(node)]
            if not layers[call.name]:
                for place_, node in enumerate(call.inputs):
                    demand(node).layers.append((call.name, place_))
    _demand_of_operators(flow, target, demands)
    if target.residuals:
        _demand_of_residuals(flow, demands, {flow.settled(node) for node in made})
    if target.outputs:
        for node in made:
            if not flow.is_held(flow.settled(node), demands):
                demand(flow.settled(node)).operators.append(node)
    return _placed(flow, demands)


def _demand_of_operators(flow: Dataflow, target: Target, demands: dict[fx.Node, _Demand]) -> None:
    """Operators whose result is computed with in integers are computed in integers too; from the last to the first."""
    found = [*(flow.sums() if target.sums else ()), *(flow.pools() if target.pools else ())]
    found += flow.joins() if target.sums else ()
    order = {node: number for number, node in enumerate(flow.recording.nodes)}
    for node, given in sorted(found, key=lambda pair: -order[pair[0]]):
        result = flow.settled(node)
        if result not in demands:
            continue
        if operator_of(node) != "cat":
            for one in given:
                demands.setdefault(flow.source(one), _Demand()).operators.append(node)


def _demand_of_residuals(flow: Dataflow, demands: dict[fx.Node, _Demand], made: set[fx.Node]) -> None:
    for node, given in flow.sums():
        if operator_of(node) == "mul" or flow.settled(node) not in demands:
            continue
        # The layer that made one side adds the other to its own result.
        adding = next((one for one in given if one in made and len(one.users) == 1), None)
        for one in given:
            if one is not adding:
                demands.setdefault(flow.source(one), _Demand()).operators.append(node)


def _placed(flow: Dataflow, demands: Mapping[fx.Node, _Demand]) -> Placement:
    given: dict[str, str | None] = {}
    inputs: dict[str, dict[int, bool]] = {}
    outputs: dict[str, bool] = {}
    computed: set[str] = set()
    notes = []
    for node, wanted in demands.items():
        above = flow.is_not_negative(node)
        readers = list(dict.fromkeys(wanted.layers))
        giver = flow.givers.get(node)
        if giver is not None and (wanted.operators or len({layer for layer, _ in readers}) > 1):
            outputs[giver.name] = above
            for layer, _ in readers:
                given[layer] = giver.name if given.get(layer, giver.name) == giver.name else None
            continue
        for layer, number in readers:
            inputs.setdefault(layer, {})[number] = above
            if not flow.is_data(node):
                computed.add(layer)
        if wanted.operators and node.op != "placeholder":
            what = ", ".join(sorted({operator_of(user) for user in wanted.operators}))
            where = node.meta.get("module") or "the model"
            notes.append(
                f"a {operator_of(node) or 'tensor'} in {where} stays in float for {what}: no module that is called "
                "once gives it; make it the result of a module of its own"
            )
    alone = {layer: giver for layer, giver in given.items() if layer not in inputs}
    data = frozenset(inputs) - computed
    return Placement(given=alone, inputs=inputs, outputs=outputs, data=data, notes=tuple(dict.fromkeys(notes)))
