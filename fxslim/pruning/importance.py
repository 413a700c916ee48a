# SPDX-License-Identifier: Apache-2.0
"""Importance: a number per channel of a group; the lowest go first. Sums are float64 on the CPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import ChannelGroup
from fxslim.graph.recording import named_states
from fxslim.graph.slots import Slot

Importance = Callable[[ChannelGroup, nn.Module], Tensor]


# Rows of a weight are summed in pieces that stay in the cache.
PIECE = 1 << 18


class Sums:
    """Sums of |w|^order over all but one dim, in float64 on the CPU, made in one pass over each weight."""

    def __init__(self, state: Tensor, order: float, blocks: int = 1) -> None:
        self.state, self.order = state.detach().cpu(), order
        rows = self.state.reshape(self.state.shape[0], -1)
        self.by_row = torch.empty(len(rows), dtype=torch.float64)
        self.by_column = torch.zeros(blocks, rows.shape[1], dtype=torch.float64)
        per_block = len(rows) // blocks
        step = max(1, min(PIECE // max(rows.shape[1], 1), per_block))
        scratch = torch.empty(step, rows.shape[1], dtype=torch.float64)
        for block in range(blocks):
            for start in range(block * per_block, (block + 1) * per_block, step):
                stop = min(start + step, (block + 1) * per_block)
                piece = self._magnitudes(scratch[: stop - start].copy_(rows[start:stop]))
                # Products with ones are the fastest sums there are.
                torch.mv(piece, piece.new_ones(piece.shape[1]), out=self.by_row[start:stop])
                self.by_column[block].addmv_(piece.t(), piece.new_ones(len(piece)))

    def _magnitudes(self, values: Tensor) -> Tensor:
        """In place."""
        return values.square_() if self.order == 2 else values.abs_()

    def of(self, slot: Slot) -> np.ndarray:
        """One sum for each entry of a slot."""
        if slot.dim == 0:
            return self.by_row.numpy()
        if slot.dim == 1:
            return self.by_column.reshape(slot.blocks * self.state.shape[1], -1).sum(1).numpy()
        others = [d for d in range(self.state.dim()) if d != slot.dim]
        return self._magnitudes(self.state.to(torch.float64, copy=True)).sum(others).numpy()


def _with_values(name: str, state: Tensor) -> Tensor:
    if state.is_meta:
        raise ConfigError(f"importance needs values, but {name} is on the meta device: use importance='random'")
    return state


def _norm_scores(graph: ChannelGraph, model: nn.Module, order: float) -> np.ndarray:
    """Per class: the mean over its weights of its share there (1 = average), so that layers of any size count alike."""
    states, classes = dict(named_states(model)), graph.resolved.classes
    total, count = np.zeros(len(classes)), np.zeros(len(classes))
    by_name: dict[str, list[Slot]] = {}
    for slot in graph.resolved.slots:
        if slot.role != "follower" and slot.ids.any():
            by_name.setdefault(slot.name, []).append(slot)
    for name, slots in by_name.items():
        sums = Sums(_with_values(name, states[name]), order, max(slot.blocks for slot in slots))
        for slot in slots:
            values = sums.of(slot)
            if not np.isfinite(values).all():
                raise ConfigError(
                    f"importance needs finite values, but {name} has NaN or infinity in "
                    f"{int((~np.isfinite(values)).sum())} of {len(values)} channels: mend the weights or use 'random'"
                )
            mean = values.mean()
            np.add.at(total, graph.resolved.of(slot), values / mean if mean > 0 else values)
            np.add.at(count, graph.resolved.of(slot), 1)
    return total / np.maximum(count, 1)


def _bn_scores(graph: ChannelGraph, model: nn.Module) -> np.ndarray:
    states, classes = dict(named_states(model)), graph.resolved.classes
    total, count = np.zeros(len(classes)), np.zeros(len(classes))
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    for slot in graph.resolved.slots:
        layer, _, attribute = slot.name.rpartition(".")
        if layer in norms and attribute == "weight":
            np.add.at(total, graph.resolved.of(slot), Sums(_with_values(slot.name, states[slot.name]), 1.0).of(slot))
            np.add.at(count, graph.resolved.of(slot), 1)
    for group in graph.groups:
        if not count[group.channels].all():
            raise ConfigError(
                f"importance='bn': group {group.name} has channels without batch norm; skip it or use 'l2'"
            )
    return total / np.maximum(count, 1)


def _random_scores(graph: ChannelGraph, seed: int) -> np.ndarray:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={seed!r} must be an integer of at least 0")
    return np.random.default_rng(seed).random(len(graph.resolved.classes))


def _user_scores(graph: ChannelGraph, model: nn.Module, function: Importance) -> np.ndarray:
    scores = np.zeros(len(graph.resolved.classes))
    for group in graph.groups:
        values = torch.as_tensor(function(group, model)).detach().to("cpu", torch.float64)
        if values.shape != (len(group),):
            raise ConfigError(
                f"importance of group {group.name}: shape {tuple(values.shape)}, expected ({len(group)},)"
            )
        if not values.isfinite().all():
            raise ConfigError(
                f"importance of group {group.name}: {int((~values.isfinite()).sum())} values are not finite"
            )
        scores[group.channels] = values.numpy()
    return scores


def channel_scores(
    graph: ChannelGraph, model: nn.Module, importance: str | Importance, seed: int, data: Data | None = None
) -> np.ndarray:
    """A score for each class of the graph: ``l1``, ``l2``, ``bn``, ``random``, or a function of group and model."""
    named = {
        "l1": lambda: _norm_scores(graph, model, 1.0),
        "l2": lambda: np.sqrt(_norm_scores(graph, model, 2.0)),
        "bn": lambda: _bn_scores(graph, model),
        "random": lambda: _random_scores(graph, seed),
    }
    if callable(importance):
        return _user_scores(graph, model, importance)
    if importance not in named:
        raise ConfigError(unknown_name("importance", importance, named))
    return named[importance]()
