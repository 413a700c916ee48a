# SPDX-License-Identifier: Apache-2.0
"""How many channels go: the lowest first, over all groups, until the target is met."""

import math
from collections.abc import Collection

import numpy as np

from fxslim.errors import ConfigError, PlanError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.slots import SlotKey
from fxslim.graph.steps import affordable, removal_steps

TARGETS = ("macs", "params", "channels")


class Removals:
    """All removals in order of rank; what is left after the first k of them, for any k."""

    def __init__(self, graph: ChannelGraph, scores: np.ndarray, blocked: Collection[int], max_ratio: float) -> None:
        self.graph = graph
        frozen = graph.resolved.frozen.copy()
        frozen[list(blocked)] = True
        candidates = np.concatenate([g.channels for g in graph.groups] or [np.zeros(0, dtype=np.int64)])
        candidates = candidates[~frozen[candidates]]
        ranked = candidates[np.lexsort((candidates, scores[candidates]))]
        steps = removal_steps(ranked, frozen, graph.resolved.balances)
        # Each group keeps its share of channels, at least one.
        left = [len(g) - max(1, math.ceil(len(g) * (1 - max_ratio))) for g in graph.groups]
        self.steps = affordable(steps, graph.groups, left)
        never = len(self.steps)
        self.rank = np.full(len(graph.resolved.classes), never, dtype=np.int64)
        self.rank[self.steps.channels] = self.steps.numbers
        self.sorted_ranks = self._sorted_ranks()

    def _sorted_ranks(self) -> list[tuple[np.ndarray, list[SlotKey]]]:
        """The ranks of channels, ascending, and the slots that hold just these: many slots hold the same."""
        found: dict[bytes, tuple[np.ndarray, list[SlotKey]]] = {}
        for slot in self.graph.resolved.slots:
            channels = self.graph.resolved.of(slot)
            key = channels.tobytes()
            if key not in found:
                found[key] = np.sort(self.rank[channels]), []
            found[key][1].append(slot.key)
        return list(found.values())

    def removed_share(self, count: int, target: str) -> float:
        """The fraction of the target that the first ``count`` removals take away."""
        cost = self.graph.cost
        if target == "channels":
            total = sum(map(len, self.graph.groups))
            return float(self.steps.starts[count]) / max(total, 1)
        shares: dict[SlotKey, float] = {}
        for ranks, keys in self.sorted_ranks:
            share = 1 - float(ranks.searchsorted(count)) / max(len(ranks), 1)
            shares.update(dict.fromkeys(keys, share))
        if target == "macs":
            return 1 - cost.macs_with(shares) / max(cost.macs, 1)
        return 1 - cost.params_with(shares) / max(cost.params, 1)

    def count_for(self, ratio: float, target: str) -> int:
        """The number of removals that brings the removed share nearest to ``ratio``."""
        if target not in TARGETS:
            raise ConfigError(unknown_name("target", target, TARGETS))
        low, high = 0, len(self.steps)
        reachable = self.removed_share(high, target)
        if reachable < ratio:
            raise PlanError(
                f"ratio={ratio} of {target} can't be reached: at most {reachable:.3f} can be removed from the "
                f"{len(self.graph.groups)} free groups; trace(model, inputs).report() shows what is frozen; "
                "raise max_ratio or lower ratio"
            )
        while low < high:
            middle = (low + high) // 2
            if self.removed_share(middle, target) < ratio:
                low = middle + 1
            else:
                high = middle
        before = self.removed_share(low - 1, target) if low > 0 else math.inf
        return low - 1 if abs(before - ratio) < abs(self.removed_share(low, target) - ratio) else low

    def kept_after(self, count: int) -> np.ndarray:
        """Which classes stay after the first ``count`` removals."""
        return self.rank >= count
