# SPDX-License-Identifier: Apache-2.0
"""Planning: which channels go. ``plan_pruning`` decides, ``prune`` also applies.

>>> from torch import nn, randn
>>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
>>> print(plan_pruning(net, randn(1, 3, 8, 8), ratio=0.5))
group   before   after  layers
0            8       4       2
macs: 12,384 -> 6,192 (50.0% kept)
params: 516 -> 260 (50.4% kept)
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data, Forward, Loss, as_data, repeatable
from fxslim.errors import PlanError
from fxslim.graph.channel_graph import ChannelGraph, trace
from fxslim.graph.conflicts import Conflict
from fxslim.graph.inputs import as_inputs
from fxslim.graph.layer_choice import Chosen
from fxslim.graph.refusals import without_compile_wrapper
from fxslim.graph.settling import Arrangement
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.allocation import Removals
from fxslim.pruning.budgets import Budget, CostBudget, MeasuredBudget, Target
from fxslim.pruning.importance.names import Criterion
from fxslim.pruning.latency import forward_milliseconds
from fxslim.pruning.layer_limits import Limits, Overrides, limits_of_groups, uneven_layers
from fxslim.pruning.pruning_plan import GroupRow, PruningPlan
from fxslim.pruning.ranking import Ranking
from fxslim.pruning.repair.mending import repair_notes
from fxslim.pruning.repair.settings import Repair, as_repair


def plan_pruning(
    model: nn.Module,
    inputs: Any,
    *,
    ratio: float = 0.5,
    target: str = "macs",
    at_most: float | None = None,
    measure: Callable[[nn.Module], float] | None = None,
    importance: Criterion = "l2",
    scope: str = "global",
    layers: Chosen | None = None,
    skip: Chosen = (),
    overrides: Overrides | None = None,
    max_ratio: float = 0.9,
    round_to: int = 1,
    heads: str = "whole",
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    repair: str | Iterable[str] | Repair | None = None,
    strict: bool = False,
    seed: int = 0,
    train_inputs: Any = None,
) -> PruningPlan:
    """Decide which channels go so that ``ratio`` of ``target`` is removed; the model is not touched (docs/pruning.md).

    ``target``: macs, params, channels, bitops, or latency as ``measure(model)`` gives it; ``at_most``: a budget.
    ``importance``: a name, an instance or a function; ``scope="layer"`` takes the same share of every group.
    Only ``layers`` lose outputs, ``skip`` stays whole, ``overrides`` maps layers to a ratio or a dict of limits: names,
    globs, types. ``strict`` leaves channels that several layers read. ``heads``: whole heads go, or ("dim") entries.
    ``data``: batches that ``forward(model, batch)`` runs and ``loss(outputs, batch)`` scores, for criteria that look
    at them and for ``repair`` ("bn", "least_squares" or both), which ``apply`` does afterwards.
    ``train_inputs``: example inputs of train mode, where it needs others (as a detector).
    """
    wished = Target(ratio=ratio, name=target, at_most=at_most, measure=measure)
    user = Limits(layers=layers, skip=skip, overrides=overrides, max_ratio=max_ratio, round_to=round_to, strict=strict)
    batches = None if data is None else repeatable(as_data(data, forward, loss))
    ranking, mended = Ranking(importance=importance, scope=scope, seed=seed, data=batches), as_repair(repair)
    model = without_compile_wrapper(model)
    graph = trace(model, inputs, heads=heads, train_inputs=train_inputs)
    plan = _settled(graph, model, inputs, wished, user, ranking)
    return _completed(plan, model, train_inputs, mended, batches)


def _settled(
    graph: ChannelGraph, model: nn.Module, inputs: Any, wished: Target, user: Limits, ranking: Ranking
) -> PruningPlan:
    """The plan, once the graph has given up what no arrangement of channels allows."""
    if not graph.groups and (wished.ratio > 0 or wished.at_most is not None):
        raise PlanError(f"no channels can be removed:\n{graph.report()}")
    while True:
        try:
            return _plan(graph, model, inputs, wished, user, ranking)
        except _Unarranged as problem:
            graph = graph.without(model, problem.conflict)


def _completed(
    plan: PruningPlan, model: nn.Module, train_inputs: Any, repair: Repair | None, data: Data | None
) -> PruningPlan:
    """The plan with example inputs of train mode, a repair, and notes of what that leaves."""
    if train_inputs is not None:
        plan = replace(plan, train_inputs=tuple(as_inputs(train_inputs)))
    if repair is None:
        return plan
    return replace(plan, repair=repair, data=data, notes=(*plan.notes, *repair_notes(model, plan.cuts, repair)))


def _plan(
    graph: ChannelGraph, model: nn.Module, inputs: Any, wished: Target, user: Limits, ranking: Ranking
) -> PruningPlan:
    """The plan that this graph allows."""
    limits = limits_of_groups(graph, model, user)
    budget = _budget(graph, model, inputs, wished)
    goal = wished.goal(budget.left(np.ones(len(graph.resolved.classes), dtype=bool)))
    if ranking.data is not None:
        # Before any work with data: whether it can be reached at all.
        Removals(graph, np.zeros(len(graph.resolved.classes)), limits).check_reachable(goal, budget)
    stay = [group.channels for group, limit in zip(graph.groups, limits, strict=True) if limit.stays]
    scores = ranking.scores(graph, model, np.concatenate(stay).tolist() if stay else [])
    kept = Removals(graph, scores, limits).kept_for(goal, budget)
    plan = removal_plan(graph, kept, _arranged(graph, kept), inputs)
    return replace(plan, notes=(*plan.notes, *goal.told(budget.left(kept)), *uneven_layers(graph, limits, kept)))


class _Unarranged(Exception):
    """A choice of channels that the graph does not allow after all."""

    def __init__(self, conflict: Conflict) -> None:
        self.conflict = conflict


def _arranged(graph: ChannelGraph, kept: np.ndarray) -> Arrangement:
    arrangement = graph.arranger.arrange(kept)
    if isinstance(arrangement, Conflict):
        raise _Unarranged(arrangement)
    return arrangement


def _budget(graph: ChannelGraph, model: nn.Module, inputs: Any, wished: Target) -> Budget:
    if wished.name != "latency":
        return CostBudget(graph, wished.name)
    examples = as_inputs(inputs)

    def measured(kept: np.ndarray) -> float:
        smaller = removal_plan(graph, kept, _arranged(graph, kept), inputs).apply(copy.deepcopy(model))
        return wished.measure(smaller) if wished.measure is not None else forward_milliseconds(smaller, examples)

    return MeasuredBudget(measured)


def prune(model: nn.Module, inputs: Any, *, optimizer: Optimizer | None = None, **settings: Any) -> nn.Module:
    """``plan_pruning(...)`` and ``apply`` in one; the model is changed in place and returned."""
    return plan_pruning(model, inputs, **settings).apply(model, optimizer=optimizer)


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
            *(
                f"{new.attribute} becomes {new.after} in a copy of its own; what others hold stays"
                for new in arrangement.attributes
                if "." in new.attribute.name
            ),
        ),
        inputs=tuple(as_inputs(inputs)),
    )
