# SPDX-License-Identifier: Apache-2.0
"""Steps joined so that after each of them every layer keeps an allowed number of channels."""

from collections.abc import Sequence

import numpy as np

from fxslim.graph.groups import ChannelGroup, group_numbers
from fxslim.graph.steps import Steps


def in_allowed_counts(steps: Steps, groups: Sequence[ChannelGroup], allowed: Sequence[np.ndarray]) -> Steps:
    """Steps of groups that go together wait for each other until all keep an allowed number; the rest is left out.

    A joined step stands where its members do in the mean.
    """
    if all(counts[1:].all() for counts in allowed):
        return steps
    all_sizes, numbers, made_by = steps.sizes.tolist(), steps.numbers, group_numbers(groups)[steps.channels]
    party = _parties(len(groups), numbers, made_by)
    kept = [len(group) for group in groups]
    wrong = [0] * len(groups)
    waiting: dict[int, list[int]] = {}
    joined: list[tuple[float, list[int]]] = []
    for i in range(len(steps)):
        mine = made_by[steps.starts[i] : steps.starts[i + 1]].tolist()
        leader = party[mine[0]]
        for group in mine:
            before = not allowed[group][kept[group]]
            kept[group] -= 1
            wrong[leader] += int(not allowed[group][kept[group]]) - int(before)
        waiting.setdefault(leader, []).append(i)
        if not wrong[leader]:
            members = waiting.pop(leader)
            joined.append((float(np.mean(members)), members))
    order = [member for _, members in sorted(joined) for member in members]
    sizes = [sum(all_sizes[member] for member in members) for _, members in sorted(joined)]
    channels = [steps.channels[steps.starts[i] : steps.starts[i + 1]] for i in order]
    return Steps(channels=np.concatenate(channels) if channels else steps.channels[:0], starts=np.cumsum([0, *sizes]))


def _parties(count: int, numbers: np.ndarray, made_by: np.ndarray) -> list[int]:
    """For each group, the first of those that it shares steps with, directly or not."""
    leader = list(range(count))

    def find(group: int) -> int:
        while leader[group] != group:
            leader[group] = leader[leader[group]]
            group = leader[group]
        return group

    same = numbers[1:] == numbers[:-1]
    for a, b in zip(made_by[:-1][same].tolist(), made_by[1:][same].tolist(), strict=True):
        low, high = sorted((find(a), find(b)))
        leader[high] = low
    return [find(group) for group in range(count)]
