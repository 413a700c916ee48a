# SPDX-License-Identifier: Apache-2.0
"""The ``desc`` of msModelSlim: kept and dropped channels of each changed layer, as text.

``{"conv1": {"output": [6, "--x--x--"]}, "bn1": {"input": [6, "--x--x--"]}, "conv2": {"input": [6, "--x--x--"]}}``
says that 6 of conv1's 8 output channels are kept, "-" for a kept one and "x" for a dropped one. A layer without
outputs of its own (a norm) has "input" only. A grouped convolution's input has one character per channel of a
group, so all groups must drop the same ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from fxslim.errors import PlanError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph, trace
from fxslim.graph.conflicts import Conflict
from fxslim.graph.slots import Slot, owner
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.planning import removal_plan
from fxslim.pruning.pruning_plan import PruningPlan

Desc = dict[str, dict[str, list[Any]]]
_KEPT, _DROPPED = "-", "x"
_OUTPUTS = ("producer", "depthwise")


def describe_cuts(cuts: tuple[Cut, ...], shapes: Mapping[str, tuple[int, ...]]) -> Desc:
    """The desc of these cuts of parameters of these shapes."""
    desc: Desc = {}
    weights: dict[str, str] = {}
    changed = {owner(cut.name) for cut in cuts if cut.role != "follower"}
    for cut in cuts:
        layer = owner(cut.name)
        if cut.name not in shapes:
            # The size of a norm without parameters follows by itself.
            continue
        if cut.role == "follower" and (layer in changed or not layer or len(shapes[cut.name]) != 1):
            # A bias goes with its weight; parameters that belong to no layer follow by themselves.
            continue
        weight = cut.name if cut.role == "follower" else weights.setdefault(layer, cut.name)
        side, value = "output" if cut.role in _OUTPUTS else "input", _side(cut, shapes[cut.name])
        if weight != cut.name or desc.setdefault(layer, {}).setdefault(side, value) != value:
            raise PlanError(
                f"{layer or 'the model'} holds several weights that lose channels, which a desc can't say; "
                "save the plan with plan.save(path) instead"
            )
    return desc


def _side(cut: Cut, shape: tuple[int, ...]) -> list[Any]:
    gone = np.ones(cut.blocks * shape[cut.dim], dtype=bool)
    gone[list(cut.keep)] = False
    blocks = gone.reshape(cut.blocks, -1)
    if (blocks != blocks[0]).any():
        raise PlanError(
            f"{cut.name}: its {cut.blocks} groups drop different input channels, which a desc can't say; save the plan "
            "with plan.save(path) instead"
        )
    text = "".join(_DROPPED if dropped else _KEPT for dropped in blocks[0])
    return [text.count(_KEPT), text]


def plan_from_desc(model: nn.Module, inputs: Any, desc: Any) -> PruningPlan:
    """See ``PruningPlan.from_desc``."""
    graph = trace(model, inputs)
    kept = np.ones(len(graph.resolved.classes), dtype=bool)
    sides = _checked(desc, graph)
    for slot, _, text in sides:
        dropped = np.array([c == _DROPPED for c in text] * slot.blocks)
        kept[graph.resolved.of(slot)[dropped]] = False
    for slot, side, text in sides:
        _check_side(slot, side, text, graph, kept)
    for rows in graph.resolved.balances:
        counts = kept[rows].sum(axis=1)
        if counts.min() != counts.max():
            layers = dict.fromkeys(s.name for s in graph.resolved.slots if np.isin(graph.resolved.of(s), rows).any())
            raise PlanError(
                f"desc leaves {counts.tolist()} channels in parts of {', '.join(list(layers)[:4])} that must stay "
                "equally large (groups or chunks); drop as many in each"
            )
    arrangement = graph.arranger.arrange(kept)
    if isinstance(arrangement, Conflict):
        raise PlanError(f"desc can't be followed: {arrangement.reason}")
    plan = removal_plan(graph, kept, arrangement, inputs)
    for cut in plan.cuts:
        if not cut.keep:
            raise PlanError(f"desc keeps no channel of {cut.name}; at least one must stay")
    return plan


def _checked(desc: Any, graph: ChannelGraph) -> list[tuple[Slot, str, str]]:
    """A slot, its place in the desc, and its text, for each side of each layer."""
    if not isinstance(desc, Mapping):
        raise PlanError(f"desc is a {type(desc).__name__}, expected a dict of layers")
    places: dict[str, dict[str, Slot]] = {}
    for slot in sorted(graph.resolved.slots, key=lambda s: s.role == "follower"):
        sides = places.setdefault(owner(slot.name), {})
        if slot.role != "follower" or not sides:
            sides.setdefault("output" if slot.role in _OUTPUTS else "input", slot)
    found = []
    for layer, given in desc.items():
        if layer not in places:
            raise PlanError("desc does not belong to this model: " + unknown_name("layer", str(layer), places))
        if not isinstance(given, Mapping):
            raise PlanError(f"desc[{layer!r}] is {given!r}, expected a dict with 'input' or 'output'")
        for side, value in given.items():
            if side not in places[layer]:
                raise PlanError(f"desc[{layer!r}]: " + unknown_name("side", str(side), places[layer]))
            slot = places[layer][side]
            found.append((slot, f"desc[{layer!r}][{side!r}]", _text(value, slot, f"desc[{layer!r}][{side!r}]")))
    return found


def _text(value: Any, slot: Slot, where: str) -> str:
    size = len(slot.ids) // slot.blocks
    if not isinstance(value, list | tuple) or len(value) != 2 or not isinstance(value[1], str):
        raise PlanError(f"{where} is {value!r}, expected [number kept, text of '-' and 'x']")
    count, text = value
    if set(text) - {_KEPT, _DROPPED} or text.count(_KEPT) != count:
        raise PlanError(f"{where} says that {count!r} are kept, its text {text!r} keeps {text.count(_KEPT)}")
    if len(text) != size:
        raise PlanError(f"{where} has {len(text)} channels, the model {size}: it does not belong to this model")
    return text


def _check_side(slot: Slot, where: str, text: str, graph: ChannelGraph, kept: np.ndarray) -> None:
    """What a side drops must be free, and nothing else may go there."""
    classes = graph.resolved.of(slot)
    for i, (c, stays) in enumerate(zip(classes.tolist(), kept[classes].tolist(), strict=True)):
        if not stays and graph.resolved.frozen[c]:
            raise PlanError(f"{where} drops channel {i}, which must stay: {graph.resolved.reason(c)}")
        if not stays and text[i % len(text)] == _KEPT:
            raise PlanError(
                f"{where} keeps channel {i}, which a layer that shares it drops: drop it in both or neither"
            )
