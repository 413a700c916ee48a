# SPDX-License-Identifier: Apache-2.0
"""``plan_pruning`` decides which channels go; ``prune`` decides and applies."""

import fnmatch
import numbers
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data, Forward, Loss, as_data
from fxslim.errors import ConfigError, PlanError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph, trace
from fxslim.graph.inputs import as_inputs
from fxslim.graph.refusals import without_compile_wrapper
from fxslim.graph.settling import Arrangement
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.allocation import Removals
from fxslim.pruning.importance import Importance, channel_scores
from fxslim.pruning.pruning_plan import GroupRow, PruningPlan
from fxslim.pruning.repair.mending import repair_notes
from fxslim.pruning.repair.settings import Repair, as_repair


def plan_pruning(
    model: nn.Module,
    inputs: Any,
    *,
    ratio: float = 0.5,
    target: str = "macs",
    importance: str | Importance = "l2",
    skip: Iterable[str | type] = (),
    max_ratio: float = 0.9,
    heads: str = "whole",
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    repair: str | Iterable[str] | Repair | None = None,
    seed: int = 0,
    train_inputs: Any = None,
) -> PruningPlan:
    """Decide which channels to remove so that ``ratio`` of the target (macs, params or channels) goes.

    The model is not touched. ``skip`` takes names, globs and types of layers whose outputs stay whole; the
    model's own output stays by itself. Attention loses whole heads; with ``heads="dim"`` equally many entries of
    each head go instead: entry i of a head's queries with entry i of its keys, and entries of its values.
    Criteria that look at activations or gradients read ``data``, batches that ``forward(model, batch)`` runs and
    ``loss(outputs, batch)`` scores: by default the first element is the input and the second the target.
    ``repair`` ("least_squares", "bn", both, or a ``Repair``) is what ``apply`` mends afterwards, from ``data`` too.
    ``train_inputs`` are example inputs of train mode, where that needs others (a detector's targets).

    >>> from torch import nn, randn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> print(plan_pruning(net, randn(1, 3, 8, 8), ratio=0.5))
    group   before   after  layers
    0            8       4       2
    macs: 12,384 -> 6,192 (50.0% kept)
    params: 516 -> 260 (50.4% kept)
    """
    _check_fractions(ratio=ratio, max_ratio=max_ratio)
    mended = as_repair(repair)
    model = without_compile_wrapper(model)
    graph = trace(model, inputs, heads=heads, train_inputs=train_inputs)
    batches = None if data is None else as_data(data, forward, loss)
    while True:
        if not graph.groups and ratio > 0:
            raise PlanError(f"no channels can be removed:\n{graph.report()}")
        scores = channel_scores(graph, model, importance, seed, batches)
        removals = Removals(graph, scores, _blocked(graph, model, skip), max_ratio)
        kept = removals.kept_after(removals.count_for(ratio, target))
        arrangement = graph.arranger.arrange(kept)
        if isinstance(arrangement, Arrangement):
            return _completed(removal_plan(graph, kept, arrangement, inputs), model, train_inputs, mended, batches)
        graph = graph.without(model, arrangement)


def prune(model: nn.Module, inputs: Any, *, optimizer: Optimizer | None = None, **settings: Any) -> nn.Module:
    """``plan_pruning(...)`` and ``apply`` in one; the model is changed in place and returned."""
    return plan_pruning(model, inputs, **settings).apply(model, optimizer=optimizer)


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < 1:
            raise ConfigError(f"{name}={value!r} must be in [0, 1): the fraction removed")


def _completed(
    plan: PruningPlan, model: nn.Module, train_inputs: Any, repair: Repair | None, data: Data | None
) -> PruningPlan:
    """The plan with example inputs of train mode, a repair, and notes of what that leaves."""
    if train_inputs is not None:
        plan = replace(plan, train_inputs=tuple(as_inputs(train_inputs)))
    if repair is None:
        return plan
    return replace(plan, repair=repair, data=data, notes=(*plan.notes, *repair_notes(model, plan.cuts, repair)))


def _blocked(graph: ChannelGraph, model: nn.Module, skip: Iterable[str | type]) -> set[int]:
    """Classes of channels that layers named by ``skip`` make."""
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for item in [skip] if isinstance(skip, str | type) else skip:
        if isinstance(item, type):
            chosen |= {name for name, module in modules.items() if isinstance(module, item)}
            continue
        found = {name for name in modules if name == item or fnmatch.fnmatchcase(name, item)}
        if not found:
            raise ConfigError("skip: " + unknown_name("layer", item, modules))
        chosen |= {name for name in modules if any(name == f or name.startswith(f + ".") for f in found)}
    blocked: set[int] = set()
    for slot in graph.resolved.slots:
        if slot.role in ("producer", "depthwise") and slot.name.rpartition(".")[0] in chosen:
            blocked.update(graph.resolved.of(slot).tolist())
    return blocked


def removal_plan(graph: ChannelGraph, kept: np.ndarray, arrangement: Arrangement, inputs: Any) -> PruningPlan:
    """The plan that keeps these classes of the graph, in this arrangement, and removes all others."""
    cuts, shares = [], {}
    # A norm's parameters and the layers around it keep the same entries: one tuple for all of them.
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    for slot in graph.resolved.slots:
        stays = kept[graph.resolved.of(slot)]
        if not stays.all():
            keep = arrangement.orders.get(slot.key) or tuple(np.flatnonzero(stays).tolist())
            keep = shared.setdefault(keep, keep)
            cuts.append(Cut(name=slot.name, dim=slot.dim, keep=keep, blocks=slot.blocks, role=slot.role))
            shares[slot.key] = len(keep) / len(slot.ids)
    rows = [
        GroupRow(
            name=g.name, before=len(g), after=int(kept[g.channels].sum()), layers=len(g.layers("producer", "consumer"))
        )
        for g in graph.groups
    ]
    cost = graph.cost
    return PruningPlan(
        cuts=tuple(cuts),
        shapes=graph.state_shapes,
        rows=tuple(rows),
        new_sizes=arrangement.attributes,
        scalings=arrangement.scalings,
        macs=(cost.macs, round(cost.macs_with(shares))),
        params=(cost.params, round(cost.params_with(shares))),
        notes=(
            *graph.notes,
            *(f"{name} was not reached by the example inputs: it stays" for name in graph.not_reached),
        ),
        inputs=tuple(as_inputs(inputs)),
    )
