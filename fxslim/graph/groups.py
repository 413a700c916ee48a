# SPDX-License-Identifier: Apache-2.0
"""Groups: channels of several layers that can only be removed together."""

from collections.abc import Sequence
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


def free_channels(groups: Sequence[ChannelGroup]) -> Ids:
    """The classes of all groups, group by group."""
    return np.concatenate([group.channels for group in groups] or [np.zeros(0, dtype=np.int64)])


def group_numbers(groups: Sequence[ChannelGroup]) -> Ids:
    """For each class of channels, up to the last free one, which group it is in (0 where none)."""
    numbers = np.zeros(1 + int(free_channels(groups).max(initial=0)), dtype=np.int64)
    for i, group in enumerate(groups):
        numbers[group.channels] = i
    return numbers


def _names(slots: list[list[Slot]]) -> list[str]:
    """Each group's first producer; further groups of the same layer get a number."""
    seen: dict[str, int] = {}
    names = []
    for mine in slots:
        name = next(owner(slot.name) for slot in mine if slot.role == "producer")
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names
