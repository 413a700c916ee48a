# SPDX-License-Identifier: Apache-2.0
"""Groups: channels of several layers that can only be removed together."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fxslim.graph.direct_states import settle_entries
from fxslim.graph.labels import FIXED, Ids
from fxslim.graph.propagation import Propagation
from fxslim.graph.slots import Slot, owner


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that live in the same places: ``channels`` are their classes, ``slots`` the places.

    conv1 -> bn1 -> conv2 with 64 channels between them is one group of 64: removing channel i cuts filter i
    of conv1, entry i of bn1, and input i of conv2. It prints as

        conv1: 64 channels | makes conv1.weight[0] | reads conv2.weight[1] | with bn1.weight[0], ...
    """

    name: str
    channels: Ids
    slots: tuple[Slot, ...]

    def __len__(self) -> int:
        return len(self.channels)

    def __str__(self) -> str:
        parts = [f"{self.name}: {len(self)} channels"]
        for verb, roles in (("makes", ("producer",)), ("reads", ("consumer",)), ("with", ("follower", "depthwise"))):
            places = [f"{slot.name}[{slot.dim}]" for slot in self.slots if slot.role in roles]
            shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
            if places:
                parts.append(f"{verb} {shown}")
        return " | ".join(parts)

    def layers(self, *roles: str) -> list[str]:
        """Names of the layers that hold the group's slots."""
        chosen = (owner(slot.name) for slot in self.slots if not roles or slot.role in roles)
        return list(dict.fromkeys(chosen))


class ResolvedLabels:
    """Labels after unification: the class of each label, which classes are frozen and why."""

    def __init__(self, propagation: Propagation) -> None:
        self.classes = propagation.space.classes()
        settled, freezes = settle_entries(propagation.entries, propagation.slots.values(), self.classes)
        self.slots = [*propagation.slots.values(), *settled]
        self.whole = propagation.whole
        self._slot_classes = {slot.key: self.classes[slot.ids] for slot in self.slots}
        # One number for each class, since parameters used directly may have millions: which reason it has, if any.
        self._reasons = [
            "not a channel" if propagation.space.count == 1 else "combined with values that are no channels"
        ]
        self._reason_of = np.full(len(self.classes), -1, dtype=np.int64)
        self._reason_of[FIXED] = 0
        for freeze in [*propagation.space.freezes, *freezes]:
            found = self.classes[freeze.ids]
            self._reason_of[found[self._reason_of[found] < 0]] = len(self._reasons)
            self._reasons.append(freeze.reason)
        self.frozen = self._reason_of >= 0
        self.balances = [self.classes[balance.rows] for balance in propagation.space.balances]

    def of(self, slot: Slot) -> Ids:
        """The class of each entry of a slot."""
        return self._slot_classes[slot.key]

    def reason(self, channel: int) -> str:
        """Why a class of channels stays; nothing for a free one."""
        found = int(self._reason_of[channel])
        return self._reasons[found] if found >= 0 else ""

    def groups(self) -> list[ChannelGroup]:
        """Free classes, grouped by the set of slots that they live in, in the order of the forward."""
        signature = np.zeros(len(self.classes), dtype=np.uint64)
        random = np.random.default_rng(0).integers(1, 2**63, size=len(self.slots), dtype=np.uint64)
        produced = np.zeros(len(self.classes), dtype=bool)
        for slot, word in zip(self.slots, random, strict=True):
            np.add.at(signature, self.of(slot), word)
            if slot.role == "producer":
                produced[self.of(slot)] = True
        free = np.flatnonzero(produced & ~self.frozen)
        order, inverse = np.unique(signature[free], return_inverse=True)
        members = sorted((free[inverse == i] for i in range(len(order))), key=lambda m: m[0])
        group_of = np.full(len(self.classes), -1, dtype=np.int64)
        for i, channels in enumerate(members):
            group_of[channels] = i
        slots: list[list[Slot]] = [[] for _ in members]
        for slot in self.slots:
            for i in np.unique(group_of[self.of(slot)]).tolist():
                if i >= 0:
                    slots[i].append(slot)
        parts = zip(_names(slots), members, slots, strict=True)
        return [ChannelGroup(name=name, channels=m, slots=tuple(mine)) for name, m, mine in parts]


def _names(slots: list[list[Slot]]) -> list[str]:
    """Each group's first producer; further groups of the same layer get a number."""
    seen: dict[str, int] = {}
    names = []
    for mine in slots:
        name = next(slot.name.rpartition(".")[0] for slot in mine if slot.role == "producer")
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def removal_steps(ranked: Iterable[int], frozen: np.ndarray, balances: list[Ids]) -> tuple[list[list[int]], set[int]]:
    """Sets of channels that can be removed together, lowest rank first; and the channels that never can.

    A channel without constraints is a set of its own. Otherwise the lowest channels of the other rows join
    until all rows of each constraint lose equally many.
    """
    rows_of: dict[int, dict[tuple[int, int], int]] = {}
    waiting: dict[tuple[int, int], list[int]] = {}
    ranked = list(ranked)
    place = {channel: i for i, channel in enumerate(ranked)}
    free = (~frozen).tolist()
    balances = distinct_balances(balances)
    for b, rows in enumerate(balances):
        for r, row in enumerate(rows):
            counts = Counter(row.tolist())
            for channel, times in counts.items():
                rows_of.setdefault(channel, {})[b, r] = times
            waiting[b, r] = sorted((c for c in counts if c in place and free[c]), key=lambda c: -place[c])
    gone: set[int] = set()
    stuck: set[int] = set()
    steps = []
    for channel in ranked:
        if channel not in rows_of:
            steps.append([channel])
            continue
        if channel in gone:
            continue
        step = _equalised(channel, gone, rows_of, waiting, balances)
        if step is None:
            stuck.add(channel)
            gone.add(channel)
            continue
        gone.update(step)
        steps.append(step)
    return steps, stuck


def affordable(steps: Iterable[list[int]], groups: Sequence[ChannelGroup], left: list[int]) -> list[list[int]]:
    """The steps that can be made one after the other while group i has ``left[i]`` channels to lose."""
    size = 1 + max((int(group.channels.max()) for group in groups), default=0)
    numbers = np.zeros(size, dtype=np.int64)
    for i, members in enumerate(groups):
        numbers[members.channels] = i
    group_of, left, chosen = numbers.tolist(), list(left), []
    for step in steps:
        if len(step) == 1:
            number = group_of[step[0]]
            if left[number] > 0:
                left[number] -= 1
                chosen.append(step)
            continue
        needed = Counter(group_of[channel] for channel in step)
        if all(left[number] >= count for number, count in needed.items()):
            for number, count in needed.items():
                left[number] -= count
            chosen.append(step)
    return chosen


def distinct_balances(balances: Iterable[Ids]) -> list[Ids]:
    """Balances without rows that hold the same channels as another, each once; a single row asks for nothing.

    >>> [rows.shape for rows in distinct_balances([np.arange(12).reshape(2, 6), np.arange(12).reshape(3, 4)])]
    [(2, 6), (3, 4)]
    """
    found: dict[tuple[int, bytes], Ids] = {}
    for rows in balances:
        different = {row.tobytes(): row for row in np.sort(rows, axis=1)}
        if len(different) > 1:
            kept = np.stack([different[key] for key in sorted(different)])
            found.setdefault((len(kept), kept.tobytes()), kept)
    return list(found.values())


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
