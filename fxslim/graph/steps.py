# SPDX-License-Identifier: Apache-2.0
"""Steps of removal: sets of channels that can only go together, since rows of a balance lose equally many."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fxslim.graph.groups import ChannelGroup, group_numbers
from fxslim.graph.labels import Ids


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Sets of channels one after the other, in one array: set i is ``channels[starts[i]:starts[i + 1]]``."""

    channels: Ids
    starts: Ids

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Ids:
        """How many channels go in each step."""
        return np.diff(self.starts)

    @property
    def numbers(self) -> Ids:
        """For each channel, in which step it goes."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def where(self, chosen: np.ndarray) -> "Steps":
        """The steps that are chosen, in their order."""
        starts = np.concatenate([[0], np.cumsum(self.sizes[chosen])])
        return Steps(channels=self.channels[chosen[self.numbers]], starts=starts)


def removal_steps(ranked: Ids, frozen: np.ndarray, balances: list[Ids]) -> Steps:
    """Sets of channels that can be removed together, lowest rank first, without those that never can.

    A channel without constraints is a set of its own. Otherwise the lowest channels of the other rows join
    until all rows of each constraint lose equally many.
    """
    balances = joined_balances(balances)
    tied = np.zeros(len(frozen), dtype=bool)
    for rows in balances:
        tied[rows] = True
    together = tied[ranked]
    if not together.any():
        return Steps(channels=ranked, starts=np.arange(len(ranked) + 1))
    sets = _balanced_sets(ranked[together].tolist(), (~frozen).tolist(), balances)
    place = np.zeros(len(frozen), dtype=np.int64)
    place[ranked] = np.arange(len(ranked))
    # Sets stand where their first channels would.
    joined = np.array([channel for members in sets for channel in members], dtype=np.int64)
    firsts = np.array([members[0] for members in sets for _ in members], dtype=np.int64)
    alone = ranked[~together]
    channels, places = np.concatenate([alone, joined]), np.concatenate([place[alone], place[firsts]])
    order = np.argsort(places, kind="stable")
    begins = np.flatnonzero(np.diff(places[order], prepend=-1))
    return Steps(channels=channels[order], starts=np.append(begins, len(channels)))


def _balanced_sets(ranked: list[int], free: list[bool], balances: list[Ids]) -> list[list[int]]:
    rows_of: dict[int, dict[tuple[int, int], int]] = {}
    waiting: dict[tuple[int, int], list[int]] = {}
    place = {channel: i for i, channel in enumerate(ranked)}
    for b, rows in enumerate(balances):
        for r, row in enumerate(rows):
            counts = Counter(row.tolist())
            for channel, times in counts.items():
                rows_of.setdefault(channel, {})[b, r] = times
            waiting[b, r] = sorted((c for c in counts if c in place and free[c]), key=lambda c: -place[c])
    gone: set[int] = set()
    sets = []
    for channel in ranked:
        if channel in gone:
            continue
        members = _equalised(channel, gone, rows_of, waiting, balances)
        gone.update(members or [channel])
        if members is not None:
            sets.append(members)
    return sets


def affordable(steps: Steps, groups: Sequence[ChannelGroup], left: Sequence[int]) -> Steps:
    """The steps that can be made one after the other while group i has ``left[i]`` channels to lose."""
    made_by, budget = group_numbers(groups)[steps.channels], np.array(left, dtype=np.int64)
    # A group that loses one channel at a time can make its first steps.
    alone, first = steps.sizes == 1, steps.starts[:-1]
    chosen = np.zeros(len(steps), dtype=bool)
    chosen[alone] = (_earlier(made_by) < budget[made_by])[first[alone]]
    # Where several go together, whether a step can be made depends on those before it.
    mixed = np.zeros(len(groups), dtype=bool)
    mixed[made_by[~alone[steps.numbers]]] = True
    budgets = budget.tolist()
    for i in np.flatnonzero(~alone | mixed[made_by[first]]).tolist():
        needed = Counter(made_by[steps.starts[i] : steps.starts[i + 1]].tolist())
        chosen[i] = all(budgets[group] >= count for group, count in needed.items())
        if chosen[i]:
            for group, count in needed.items():
                budgets[group] -= count
    return steps.where(chosen)


def _earlier(values: Ids) -> Ids:
    """For each value, how many equal ones come before it.

    >>> _earlier(np.array([5, 7, 5, 5, 7])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    counts = np.arange(len(values)) - np.repeat(begins, np.diff(begins, append=len(values)))
    found = np.empty_like(counts)
    found[order] = counts
    return found


def joined_balances(balances: Iterable[Ids]) -> list[Ids]:
    """Balances that share a row as one, its rows each once; a single row asks for nothing.

    >>> first, second, third = np.arange(12).reshape(3, 4)
    >>> [len(rows) for rows in joined_balances([np.stack([first, second]), np.stack([second, third])])]
    [3]
    """
    found: list[dict[bytes, Ids]] = []
    for rows in balances:
        mine = {row.tobytes(): row for row in np.sort(rows, axis=1)}
        if len(mine) > 1:
            sharing = [other for other in found if not mine.keys().isdisjoint(other)]
            found = [other for other in found if mine.keys().isdisjoint(other)]
            for other in sharing:
                mine.update(other)
            found.append(mine)
    return [np.stack([mine[key] for key in sorted(mine)]) for mine in found]


class _LostCounts:
    """How many entries each row of a balance has lost."""

    def __init__(self, rows: int) -> None:
        self.counts = [0] * rows
        self.most, self.with_most = 0, rows

    @property
    def even(self) -> bool:
        return self.with_most == len(self.counts)

    def lose(self, row: int, entries: int) -> None:
        lost = self.counts[row] = self.counts[row] + entries
        if lost > self.most:
            self.most, self.with_most = lost, 1
        elif lost == self.most:
            self.with_most += 1

    def least(self) -> int:
        return self.counts.index(min(self.counts))


def _equalised(
    first: int,
    gone: set[int],
    rows_of: dict[int, dict[tuple[int, int], int]],
    waiting: dict[tuple[int, int], list[int]],
    balances: list[Ids],
) -> list[int] | None:
    """The first channel and those that must go with it; None where rows can't be made equal."""
    step = {first: None}
    lost: dict[int, _LostCounts] = {}
    looked: dict[tuple[int, int], int] = {}

    def take(channel: int) -> None:
        for (b, r), entries in rows_of.get(channel, {}).items():
            if b not in lost:
                lost[b] = _LostCounts(len(balances[b]))
            lost[b].lose(r, entries)
            if lost[b].even:
                uneven.pop(b, None)
            else:
                uneven[b] = None

    def lowest(key: tuple[int, int]) -> int | None:
        """The lowest channel of a row that is still there; channels of this step may come back, those gone never."""
        row = waiting[key]
        while row and row[-1] in gone:
            row.pop()
        i = min(looked.get(key, len(row)), len(row)) - 1
        while i >= 0 and (row[i] in gone or row[i] in step):
            i -= 1
        looked[key] = i + 1
        return row[i] if i >= 0 else None

    uneven: dict[int, None] = {}
    take(first)
    while uneven:
        b = next(iter(uneven))
        choice = lowest((b, lost[b].least()))
        if choice is None:
            return None
        step[choice] = None
        take(choice)
    return list(step)
