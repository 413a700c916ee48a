# SPDX-License-Identifier: Apache-2.0
"""Pruning step by step inside of the user's own training loop: masks grow by a schedule, at its end channels go."""

from typing import Any, Self

import numpy as np
from torch import nn
from torch.optim import Optimizer

from fxslim.errors import CheckpointError, ConfigError
from fxslim.pruning.importance.criterion import Context, Importance
from fxslim.pruning.importance.names import Criterion, channel_scores
from fxslim.pruning.planning import plan_pruning
from fxslim.pruning.pruning_plan import PruningPlan
from fxslim.schedules import Schedule, schedule_from_dict


class Pruner:
    """Call ``step()`` after each step of the optimizer; the schedule's value is the fraction of the target removed.

    Until its end the model is masked: it keeps its shapes and computes what the pruned one would. Then the channels
    are removed, parameters stay the same objects and the optimizer goes on. What was masked stays masked.
    ``schedule`` may be a name too ("agp", "linear", "cosine", "constant" for one shot) with ``ratio`` and ``steps``.
    ``settings`` are those of ``plan_pruning``.

    >>> import torch
    >>> from fxslim.schedules import AGPSchedule
    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> pruner = Pruner(net, torch.randn(2, 4), AGPSchedule(end=0.5, steps=3))
    >>> while not pruner.finished:
    ...     changed = pruner.step()
    >>> net[0].out_features
    8
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        schedule: Schedule | str,
        *,
        ratio: float | None = None,
        steps: int | None = None,
        optimizer: Optimizer | None = None,
        importance: Criterion = "l2",
        **settings: Any,
    ) -> None:
        schedule = _as_schedule(schedule, ratio, steps)
        if "at_most" in settings:
            raise ConfigError(f"at_most: the schedule's end ({schedule.end}) is the fraction that is removed")
        if not 0 <= schedule.start <= schedule.end < 1:
            raise ConfigError(f"the schedule must rise inside of [0, 1), not from {schedule.start} to {schedule.end}")
        self.model, self.inputs, self.schedule, self.optimizer = model, inputs, schedule, optimizer
        self.importance, self.settings = importance, settings
        self.steps_done = 0
        self.plan: PruningPlan | None = None
        self.finished = False
        # Now rather than in the middle of a training: whether the end can be reached.
        plan_pruning(model, inputs, **self._settings_for(schedule.end))

    def _settings_for(self, ratio: float) -> dict[str, Any]:
        importance = self.importance if self.plan is None else _Before(self.importance, self.plan)
        return {**self.settings, "ratio": ratio, "importance": importance}

    @property
    def ratio(self) -> float:
        """The fraction that is removed or masked now."""
        return self.schedule.value_at(self.steps_done - 1) if self.steps_done else 0.0

    def step(self) -> bool:
        """One step of the schedule; whether the mask changed or the channels went. After the end it does nothing."""
        if self.finished:
            return False
        before, self.steps_done = self.ratio, self.steps_done + 1
        try:
            if self.steps_done - 1 >= self.schedule.begin + self.schedule.steps:
                self._remove()
                return True
            if self.ratio == before:
                return False
            self._mask(self._next_plan())
            return True
        except BaseException:
            self.steps_done -= 1
            raise

    def _next_plan(self) -> PruningPlan:
        """A plan of the model as it is, without its mask while it is looked at."""
        if self.plan is None:
            return plan_pruning(self.model, self.inputs, **self._settings_for(self.ratio))
        self.plan.unmask(self.model)
        try:
            return plan_pruning(self.model, self.inputs, **self._settings_for(self.ratio))
        finally:
            self.plan.mask(self.model)

    def _mask(self, plan: PruningPlan) -> None:
        if self.plan is not None:
            self.plan.unmask(self.model)
        plan.mask(self.model, optimizer=self.optimizer)
        self.plan = plan

    def _remove(self) -> None:
        plan = self._next_plan()
        if self.plan is not None:
            self.plan.unmask(self.model)
        try:
            plan.apply(self.model, optimizer=self.optimizer)
        except BaseException:
            if self.plan is not None:
                self.plan.mask(self.model)
            raise
        self.plan, self.finished = plan, True

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as plain data to save beside the model's and the optimizer's state."""
        plan = None if self.plan is None else self.plan.to_dict()
        return {"steps_done": self.steps_done, "finished": self.finished, "plan": plan}

    def load_state_dict(self, state: dict[str, Any]) -> Self:
        """Go on where ``state_dict`` was taken, on a model as it was before any step, or loaded with its plan."""
        if set(state) != {"steps_done", "finished", "plan"}:
            raise CheckpointError(f"a pruner's state has steps_done, finished and plan, but this has {sorted(state)}")
        plan = None if state["plan"] is None else PruningPlan.from_dict(state["plan"])
        if plan is not None and not state["finished"]:
            self._mask(plan)
        self.plan, self.steps_done, self.finished = plan, state["steps_done"], state["finished"]
        return self


def _as_schedule(schedule: Schedule | str, ratio: float | None, steps: int | None) -> Schedule:
    given = [f"{name}={value}" for name, value in (("ratio", ratio), ("steps", steps)) if value is not None]
    if isinstance(schedule, Schedule):
        if given:
            raise ConfigError(
                f"{' and '.join(given)}: the schedule has its own, end={schedule.end} and steps={schedule.steps}"
            )
        return schedule
    if steps is None:
        raise ConfigError(f"schedule={schedule!r} needs steps=: after how many calls of step() its end is reached")
    return schedule_from_dict({"name": schedule, "end": 0.5 if ratio is None else ratio, "steps": steps})


class _Before(Importance):
    """A criterion for which what an earlier plan removed is the lowest."""

    def __init__(self, inner: Criterion, earlier: PruningPlan) -> None:
        self.inner, self.earlier = inner, earlier

    def scores(self, context: Context) -> np.ndarray:
        graph = context.graph
        scores = channel_scores(graph, context.model, self.inner, context.seed, context.data, context.skipped)
        cuts = {(cut.name, cut.dim): cut for cut in self.earlier.cuts}
        gone = np.zeros(len(scores), dtype=bool)
        for slot in graph.resolved.slots:
            if slot.role != "consumer" and slot.key in cuts:
                stays = np.zeros(len(slot.ids), dtype=bool)
                stays[list(cuts[slot.key].keep)] = True
                gone[graph.resolved.of(slot)[~stays]] = True
        finite = scores[np.isfinite(scores)]
        return np.where(gone, (finite.min() if len(finite) else 0.0) - 1.0, scores)
