# SPDX-License-Identifier: Apache-2.0
"""How many channels go: the lowest first, over all groups, until the target is met."""

from collections.abc import Collection, Sequence

import numpy as np

from fxslim.errors import PlanError
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import free_channels, group_numbers
from fxslim.graph.steps import affordable, removal_steps
from fxslim.pruning.budgets import Budget, Goal, readable
from fxslim.pruning.layer_limits import GroupLimit
from fxslim.pruning.rounding import in_allowed_counts

# A choice this near to the target is not improved any more.
_NEAR = 0.002


class Removals:
    """All removals in order of rank, those that must be made first; what is left after the first k of them."""

    def __init__(
        self, graph: ChannelGraph, scores: np.ndarray, limits: Sequence[GroupLimit], blocked: Collection[int] = ()
    ) -> None:
        self.graph, self.limits = graph, limits
        frozen, late = graph.resolved.frozen.copy(), np.ones(len(scores), dtype=bool)
        for group, limit in zip(graph.groups, limits, strict=True):
            frozen[group.channels] |= limit.stays
            late[group.channels] = not limit.exactly
        frozen[list(blocked)] = True
        candidates = free_channels(graph.groups)
        candidates = candidates[~frozen[candidates]]
        ranked = candidates[np.lexsort((candidates, scores[candidates], late[candidates]))]
        steps = removal_steps(ranked, frozen, graph.resolved.balances)
        steps = affordable(steps, graph.groups, [limit.at_most for limit in limits])
        self.steps = in_allowed_counts(steps, graph.groups, [limit.allowed for limit in limits])
        self.rank = np.full(len(graph.resolved.classes), len(self.steps), dtype=np.int64)
        self.rank[self.steps.channels] = self.steps.numbers
        # Steps that must be made: all up to the last one of a layer that loses just so many.
        must = np.flatnonzero(~late[self.steps.channels])
        self.first = int(self.steps.numbers[must].max()) + 1 if len(must) else 0
        self._check_exact()

    def _check_exact(self) -> None:
        for group, limit in zip(self.graph.groups, self.limits, strict=True):
            gone = int((self.rank[group.channels] < self.first).sum())
            if limit.exactly and gone != limit.at_most:
                raise PlanError(
                    f"overrides: group {group.name} should lose {limit.at_most} of {len(group)} channels but can lose "
                    f"{gone}: parts that stay equal (groups, heads, chunks) or layers tied to it allow no more"
                )

    def kept_after(self, count: int) -> np.ndarray:
        """Which classes stay after the first ``count`` removals."""
        return self.rank >= count

    def kept_for(self, goal: Goal, budget: Budget) -> np.ndarray:
        """What stays when the target is met, as near as a single further step can bring it."""
        self.check_reachable(goal, budget)
        low, high = self.first, len(self.steps)
        while low < high:
            middle = (low + high) // 2
            if budget.left(self.kept_after(middle)) > goal.left:
                low = middle + 1
            else:
                high = middle
        return self._nearest(low, goal, budget, _NEAR * goal.everything)

    def _nearest(self, first: int, goal: Goal, budget: Budget, near: float) -> np.ndarray:
        """The step that goes past the target, or those after it that do not: whichever ends nearest to it.

        A step that is left out takes along all later ones of its groups, which stand behind it.
        """
        going = np.arange(len(self.steps)) < first
        chosen = self._kept(going)
        best = goal.distance(budget.left(chosen))
        open_steps = np.arange(len(self.steps)) >= self.first
        while best > near and first > self.first:
            # Without the last step that was made, and its groups: as many of the others as fit.
            going[first - 1] = False
            open_steps &= ~self._tied_to(first - 1) | going
            later = np.flatnonzero(open_steps & ~going)
            low, high = 0, len(later)
            while low < high:
                middle = (low + high + 1) // 2
                tried = going.copy()
                tried[later[:middle]] = True
                low, high = (middle, high) if budget.left(self._kept(tried)) >= goal.left else (low, middle - 1)
            going[later[:low]] = True
            beyond = going.copy()
            beyond[later[low : low + 1]] = True
            for tried in (going, beyond):
                distance = goal.distance(budget.left(self._kept(tried)))
                if distance < best:
                    best, chosen = distance, self._kept(tried)
            if low == len(later):
                break
            first = int(later[low]) + 1
        return chosen

    def _kept(self, going: np.ndarray) -> np.ndarray:
        """What stays when these steps are made."""
        kept = np.ones_like(self.rank, dtype=bool)
        kept[self.steps.channels[going[self.steps.numbers]]] = False
        return kept

    def _tied_to(self, step: int) -> np.ndarray:
        """Steps that remove channels of the same groups."""
        made_by = group_numbers(self.graph.groups)[self.steps.channels]
        touched = np.zeros(len(self.graph.groups), dtype=bool)
        touched[made_by[self.steps.numbers == step]] = True
        found = np.zeros(len(self.steps), dtype=bool)
        found[self.steps.numbers[touched[made_by]]] = True
        return found

    def check_reachable(self, goal: Goal, budget: Budget) -> None:
        """Raise where even all removals leave more than the goal."""
        least = budget.left(self.kept_after(len(self.steps)))
        if least <= goal.left:
            return
        asked = f"ratio={1 - goal.left / goal.everything:.4g} of"
        if goal.never_more:
            asked = f"at_most={readable(goal.left)}"
        raise PlanError(
            f"{asked} {goal.target} can't be reached: of {readable(goal.everything)} at least {readable(least)} stay, "
            f"at most {1 - least / goal.everything:.3f} can be removed from the {len(self.graph.groups)} free groups; "
            "trace(model, inputs).report() shows what is frozen; raise max_ratio, lower round_to, "
            "let more layers lose channels (layers=, skip=), or ask for less"
        )
