# SPDX-License-Identifier: Apache-2.0
"""Puts the channels of a model in an order in which N:M along inputs keeps more, without any other effect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from fxslim.batches import Data
from fxslim.errors import ConfigError
from fxslim.graph.channel_graph import ChannelGraph, trace
from fxslim.graph.groups import ResolvedLabels
from fxslim.graph.inputs import Inputs
from fxslim.graph.labels import Ids
from fxslim.graph.recording import named_states
from fxslim.graph.reordering import interchangeable_channels, reordering_cuts
from fxslim.graph.surgery.cutting import Cut, cut_tensor
from fxslim.patterns import NM, Pattern
from fxslim.sparsity.channel_order import best_order
from fxslim.sparsity.masked_readers import Reader, View, find_readers, input_scores
from fxslim.sparsity.methods import Method
from fxslim.sparsity.reordering_proof import ReorderingProof, exact_parts


@dataclass(frozen=True, kw_only=True)
class Reordering:
    """Cuts that keep every entry, and what the user should know about them."""

    cuts: tuple[Cut, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Move:
    """Classes of channels, and those that come in their places."""

    channels: Ids
    new: Ids


def check_permutable(model: nn.Module, pattern: Pattern, examples: Sequence[Inputs]) -> None:
    """Permuting needs a pattern of neighbouring inputs, and example inputs for finding what moves along."""
    if not isinstance(pattern, NM) or pattern.axis != 1:
        raise ConfigError(
            f"permute=True puts input channels in an order in which n of m neighbours keep more, and {pattern} "
            "does not go by neighbouring inputs: give a pattern such as '2:4', or leave permute= out"
        )
    if not examples:
        raise ConfigError(
            "permute=True moves channels in all layers that share them, which a forward shows: give example_inputs="
        )
    meta = [name for name, state in named_states(model) if state.is_meta]
    if meta:
        raise ConfigError(f"permute=True looks at weights, and {meta[0]} is on the meta device: give the model values")
    if not all(inputs.have_values for inputs in examples):
        raise ConfigError("permute=True is proved on example_inputs=, and these are on the meta device: give values")


def plan_reordering(
    model: nn.Module,
    patterns: Mapping[str, Pattern],
    method: Method,
    data: Data | None,
    examples: Sequence[Inputs],
) -> Reordering:
    """The order of channels in which these masks keep the highest scores, proved to change nothing else."""
    graph = trace(model, list(examples))
    nm = {name: own for name, own in patterns.items() if isinstance(own, NM) and own.axis == 1}
    scores = input_scores(model, nm, method, data)
    readers = find_readers(model, graph.resolved, nm, scores)
    before = _share(readers, ())
    moves = [
        move
        for channels in interchangeable_channels(graph)
        if (move := _best_move(graph.resolved, channels, readers)) is not None
    ]
    if not moves:
        return Reordering(notes=("permute: no order of channels keeps more than the one that they have",))
    states, proof = [name for name, _ in named_states(model)], ReorderingProof(model, examples)

    def cuts_of(some: Sequence[_Move]) -> tuple[Cut, ...]:
        return reordering_cuts(graph.resolved, states, _places(graph.resolved, some))

    exact = exact_parts(moves, lambda some: proof.holds(cuts_of(some)))
    cuts = cuts_of(exact)
    after = _share(find_readers(model, graph.resolved, nm, scores), cuts)
    notes = [
        f"permute: {sum(len(move.channels) for move in exact)} channels are reordered: masks keep {after:.2%} of a "
        f"weight's {method.name} scores on average, not {before:.2%}"
    ]
    exact_ids = {id(move) for move in exact}
    notes += [_told(graph, move) for move in moves if id(move) not in exact_ids]
    return Reordering(cuts=cuts, notes=tuple(notes))


def _share(readers: Sequence[Reader], cuts: Sequence[Cut]) -> float:
    """What masks keep of the scores of a weight, on average, after these cuts."""
    by_place = {(cut.name, cut.dim): cut for cut in cuts}
    pairs = [(reader.kept(by_place.get(reader.slot.key)), float(reader.scores.sum())) for reader in readers]
    return sum(kept / total if total else 1.0 for kept, total in pairs) / max(1, len(pairs))


def _told(graph: ChannelGraph, move: _Move) -> str:
    group = next(group for group in graph.groups if move.channels[0] in group.channels)
    return (
        f"permute: {len(move.channels)} channels of {group.name} keep their order: in another one the outputs on "
        "example_inputs differ"
    )


def _places(resolved: ResolvedLabels, moves: Sequence[_Move]) -> Ids:
    """For each class, which one comes in its place."""
    places = np.arange(len(resolved.classes))
    for move in moves:
        places[move.channels] = move.new
    return places


def _best_move(resolved: ResolvedLabels, channels: Ids, readers: Sequence[Reader]) -> _Move | None:
    """The best order that the search finds for a set, where it keeps more; readers are brought in it."""
    mine = [reader for reader in readers if np.isin(channels[:1], reader.classes).any()]
    views, blocks = _agreeing([view for reader in mine for view in reader.views(channels)])
    inside = np.flatnonzero(blocks >= 0)
    if len(np.unique(blocks[inside])) < 2:
        return None
    inside = inside[np.argsort(blocks[inside], kind="stable")]
    order = best_order([(view.rows[:, view.columns[inside]], view.n) for view in views], views[0].m).numpy()
    move = _Move(channels=channels[inside], new=channels[inside][order])
    cuts = {(cut.name, cut.dim): cut for cut in reordering_cuts(resolved, _names(mine), _places(resolved, [move]))}
    found = [(reader, cuts[reader.slot.key]) for reader in mine if reader.slot.key in cuts]
    if sum(reader.kept(cut) - reader.kept() for reader, cut in found) <= 0:
        return None
    for reader, cut in found:
        reader.scores = cut_tensor(reader.scores, [cut])
    return move


def _names(readers: Sequence[Reader]) -> list[str]:
    return [reader.slot.name for reader in readers]


def _agreeing(views: Sequence[View]) -> tuple[list[View], Ids]:
    """The views with the most entries that have their channels in the same blocks, and those."""
    alike: dict[tuple[int, bytes], list[View]] = {}
    for view in views:
        alike.setdefault((view.m, view.blocks.tobytes()), []).append(view)
    with_blocks = [some for some in alike.values() if len(np.unique(some[0].blocks)) > 1]
    if not with_blocks:
        return [], np.zeros(0, dtype=np.int64)
    most = max(with_blocks, key=lambda some: sum(view.rows.shape[0] for view in some))
    return most, most[0].blocks
