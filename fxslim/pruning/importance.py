# SPDX-License-Identifier: Apache-2.0
"""Importance: a number per channel of a group; the lowest go first. Sums are float64 on the CPU."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import ChannelGroup
from fxslim.graph.recording import named_states
from fxslim.graph.slots import Slot

Importance = Callable[[ChannelGroup, nn.Module], Tensor]


def _magnitudes(name: str, state: Tensor, order: float) -> Tensor:
    """|w|^order, on the CPU."""
    if state.is_meta:
        raise ConfigError(f"importance needs values, but {name} is on the meta device: use importance='random'")
    values = state.detach().cpu()
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    return values.square() if order == 2 else values.abs()


def _per_entry(magnitudes: Tensor, slot: Slot) -> np.ndarray:
    """The sum over all else, made in float64, for each entry of a slot."""
    if slot.blocks > 1:
        magnitudes = magnitudes.reshape(slot.blocks, -1, *magnitudes.shape[1:])
        others = [1, *range(3, magnitudes.dim())]
        return magnitudes.sum(others, dtype=torch.float64).flatten().numpy()
    others = [d for d in range(magnitudes.dim()) if d != slot.dim]
    return (magnitudes.sum(others, dtype=torch.float64) if others else magnitudes.double()).numpy()


def _norm_scores(graph: ChannelGraph, model: nn.Module, order: float) -> np.ndarray:
    """Per class: the mean over its weights of its share there (1 = average), so that layers of any size count alike."""
    states, classes = dict(named_states(model)), graph.resolved.classes
    total, count = np.zeros(len(classes)), np.zeros(len(classes))
    name, magnitudes = "", torch.empty(0)
    for slot in sorted(graph.resolved.slots, key=lambda s: s.name):
        if slot.role == "follower" or not slot.ids.any():
            continue
        if slot.name != name:
            name, magnitudes = slot.name, _magnitudes(slot.name, states[slot.name], order)
        values = _per_entry(magnitudes, slot)
        if not np.isfinite(values).all():
            raise ConfigError(
                f"importance needs finite values, but {slot.name} has NaN or infinity in "
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
            np.add.at(total, graph.resolved.of(slot), _per_entry(_magnitudes(slot.name, states[slot.name], 1.0), slot))
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


def channel_scores(graph: ChannelGraph, model: nn.Module, importance: str | Importance, seed: int) -> np.ndarray:
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
