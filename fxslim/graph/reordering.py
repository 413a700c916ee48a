# SPDX-License-Identifier: Apache-2.0
"""Reordering: which channels can change places without any effect, and what that means for parameters.

Whatever a forward does with channels, it does to the places where they live. Two channels of a group that live
in the same values, as often, and in the same rows wherever layers work on rows, are told apart by nothing but
their place in parameters: exchanged in all of those, every layer computes what it did, and sums have another order.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import ResolvedLabels
from fxslim.graph.labels import Ids, Labels
from fxslim.graph.propagation import Propagation
from fxslim.graph.surgery.cutting import Cut


def interchangeable_channels(graph: ChannelGraph) -> list[Ids]:
    """Sets of classes that can change places among themselves, each within a group.

    conv1 -> x[:, :4], x[:, 4:] -> relu of the first only -> cat -> conv2: one group for pruning, two sets here.
    """
    marks = _marks(graph.arranger.propagation, graph.resolved)
    sets = []
    for group in graph.groups:
        _, inverse = np.unique(marks[group.channels], return_inverse=True)
        sets += [group.channels[inverse == i] for i in range(int(inverse.max()) + 1)]
    return [channels for channels in sets if len(channels) > 1]


def _marks(propagation: Propagation, resolved: ResolvedLabels) -> Ids:
    """A number for each class: equal where two live in the same values and rows, equally often."""
    random = np.random.default_rng(0)
    marks = np.zeros(len(resolved.classes), dtype=np.uint64)
    for classes in _homes(propagation, resolved):
        np.add.at(marks, classes, random.integers(1, 2**63, dtype=np.uint64))
    return marks.astype(np.int64)


def _homes(propagation: Propagation, resolved: ResolvedLabels) -> Iterator[Ids]:
    for value in propagation.values.values():
        for labels in [value] if isinstance(value, Labels) else value:
            yield resolved.classes[labels.ids.reshape(-1)]
    for slot in resolved.slots:
        yield from resolved.of(slot).reshape(slot.blocks, -1)
    for rows in resolved.balances:
        yield from rows


def reordering_cuts(resolved: ResolvedLabels, states: Iterable[str], places: Ids) -> tuple[Cut, ...]:
    """Cuts that keep everything and put class ``places[c]`` where class c was, in these states.

    A class with several entries (pixels, gates, entries of a head) keeps their order.
    """
    known, cuts = set(states), []
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    for slot in resolved.slots:
        old = resolved.of(slot)
        new = places[old]
        if slot.name not in known or np.array_equal(old, new):
            continue
        order = np.empty(len(old), dtype=np.int64)
        order[np.argsort(new, kind="stable")] = np.argsort(old, kind="stable")
        keep = tuple(order.tolist())
        keep = shared.setdefault(keep, keep)
        cuts.append(Cut(name=slot.name, dim=slot.dim, keep=keep, blocks=slot.blocks, role=slot.role))
    return tuple(cuts)
