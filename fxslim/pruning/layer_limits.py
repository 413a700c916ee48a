# SPDX-License-Identifier: Apache-2.0
"""What a user's ``layers``, ``skip``, ``overrides``, ``max_ratio`` and ``round_to`` mean for each group of channels."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.channel_graph import ChannelGraph
from fxslim.graph.groups import ChannelGroup
from fxslim.graph.layer_choice import Chosen, chosen_layers, settings_by_layer
from fxslim.graph.slots import owner
from fxslim.pruning.strict_coupling import indirect_groups, refuse_indirect

Overrides = Mapping[str | type, float | Mapping[str, Any]]
_KEYS = ("ratio", "max_ratio", "round_to")


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """How many channels a group may lose, at most or (``exactly``) neither more nor less."""

    at_most: int
    exactly: bool = False
    # The user said that it stays: other channels can't go where they need its channels to go with them.
    stays: bool = False
    round_to: int = 1
    # Whether so many channels may be kept, for each number from 0 to all.
    allowed: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a user said about layers, for all groups of a graph."""

    layers: Chosen | None = None
    skip: Chosen = ()
    overrides: Overrides | None = None
    max_ratio: float = 0.9
    round_to: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        check_fraction("max_ratio", self.max_ratio)
        check_multiple("round_to", self.round_to)


def limits_of_groups(graph: ChannelGraph, model: nn.Module, user: Limits) -> list[GroupLimit]:
    """One limit for each group of the graph; what is named must exist, be prunable, and not contradict itself."""
    skipped = chosen_layers(model, user.skip, "skip")
    wanted = None if user.layers is None else chosen_layers(model, user.layers, "layers")
    if wanted is not None:
        _check_prunable(graph, {name for name in wanted if _is_named(user.layers, name)}, "layers")
    given = settings_by_layer(model, user.overrides or {}, "overrides")
    settings = {name: _checked(setting, name) for name, setting in given.items()}
    _check_prunable(graph, {name for name in settings if _is_named(user.overrides, name)}, "overrides")
    usual = {"max_ratio": user.max_ratio, "round_to": user.round_to}
    indirect = {group.name for group in indirect_groups(graph)} if user.strict else set()
    limits = []
    for group in graph.groups:
        makers = group.layers("producer", "depthwise")
        mine = _common(group, {name: settings[name] for name in makers if name in settings})
        stays = not skipped.isdisjoint(makers)
        if wanted is not None and not stays:
            stays = not wanted.issuperset(group.layers("producer"))
            _check_partners(group, wanted, user.layers)
        if group.name in indirect:
            if wanted is not None and not stays:
                refuse_indirect(group)
            stays = True
        limits.append(_limit(graph, group, usual | mine, stays=stays))
    return limits


def check_fraction(name: str, value: Any) -> None:
    """Raise unless it is a fraction that may be removed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise ConfigError(f"{name}={value!r} must be in [0, 1): the fraction removed")


def check_multiple(name: str, value: Any) -> None:
    """Raise unless it is a number of channels."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1: kept channels are its multiples")


def _checked(setting: Any, layer: str) -> dict[str, Any]:
    if not isinstance(setting, Mapping):
        setting = {"ratio": setting}
    for key, value in setting.items():
        if key not in _KEYS:
            raise ConfigError(f"overrides of {layer}: " + unknown_name("key", str(key), _KEYS))
        (check_multiple if key == "round_to" else check_fraction)(f"overrides of {layer}: {key}", value)
    return dict(setting)


def _is_named(chosen: Any, name: str) -> bool:
    """Whether a layer is named itself, not by a glob, a type or what it is in."""
    return name == chosen or (not isinstance(chosen, str | type) and name in list(chosen))


def _check_prunable(graph: ChannelGraph, names: set[str], argument: str) -> None:
    free = {name for group in graph.groups for name in group.layers("producer", "depthwise")}
    holders = {owner(name) for name in graph.state_shapes}
    for name in sorted(names - free):
        if name in holders:
            raise ConfigError(f"{argument}: {name} has no channels that can be removed:\n{graph.explain(name)}")
        if not any(layer.startswith(f"{name}.") or not name for layer in free):
            raise ConfigError(f"{argument}: {name} has no layer in it whose channels can be removed")


def _check_partners(group: ChannelGroup, wanted: set[str], layers: Any) -> None:
    makers = group.layers("producer")
    others = [name for name in makers if name not in wanted]
    named = [name for name in makers if name in wanted and _is_named(layers, name)]
    if named and others:
        raise ConfigError(
            f"layers: {named[0]} can lose channels only together with {' and '.join(others)}: name "
            f"{'it' if len(others) == 1 else 'them'} too"
        )


def _common(group: ChannelGroup, settings: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of a group's layers, which lose the same channels and so can't be set apart."""
    joined: dict[str, Any] = {}
    source: dict[str, str] = {}
    for layer, setting in settings.items():
        for key, value in setting.items():
            if joined.setdefault(key, value) != value:
                raise ConfigError(
                    f"overrides contradict each other: {source[key]} has {key}={joined[key]} and {layer} has "
                    f"{key}={value}, but both lose the same channels (group {group.name})"
                )
            source.setdefault(key, layer)
    return joined


def _limit(graph: ChannelGraph, group: ChannelGroup, setting: Mapping[str, Any], *, stays: bool) -> GroupLimit:
    allowed = _allowed_counts(graph, group, setting["round_to"])
    if stays:
        return GroupLimit(at_most=0, stays=True, round_to=setting["round_to"], allowed=allowed)
    if "ratio" not in setting:
        keeps = max(1, math.ceil(len(group) * (1 - setting["max_ratio"])))
        return GroupLimit(at_most=len(group) - keeps, round_to=setting["round_to"], allowed=allowed)
    keeps = max(1, len(group) - round(len(group) * setting["ratio"]))
    keeps += int(np.argmax(allowed[keeps:]))
    # Nothing in between: the channels go together.
    just = np.zeros_like(allowed)
    just[[keeps, len(group)]] = True
    return GroupLimit(at_most=len(group) - keeps, exactly=True, round_to=setting["round_to"], allowed=just)


def _allowed_counts(graph: ChannelGraph, group: ChannelGroup, round_to: int) -> np.ndarray:
    """Which numbers of kept channels leave every layer that makes them a multiple of ``round_to``; all may stay."""
    counts, resolved = np.arange(len(group) + 1), graph.resolved
    allowed = counts > 0
    if round_to > 1:
        for slot in group.slots:
            if slot.role != "consumer" and slot.blocks == 1:
                classes = resolved.of(slot)
                width = int((classes == group.channels[0]).sum())
                allowed &= (int(resolved.frozen[classes].sum()) + width * counts) % round_to == 0
    allowed[-1] = True
    return allowed


def uneven_layers(graph: ChannelGraph, limits: Sequence[GroupLimit], kept: np.ndarray) -> list[str]:
    """Notes on layers that can lose channels and yet keep no multiple of what was asked for."""
    asked = np.ones(len(kept), dtype=np.int64)
    for group, limit in zip(graph.groups, limits, strict=True):
        asked[group.channels] = limit.round_to
    notes = []
    for slot in graph.resolved.slots:
        classes = graph.resolved.of(slot)
        multiple = int(asked[classes].max(initial=1))
        left = int(kept[classes].sum())
        if slot.role == "producer" and slot.name.endswith("weight") and left % multiple:
            why = "it has no other multiple" if left == len(classes) else "its parts go with different layers"
            notes.append(f"round_to={multiple}: {owner(slot.name)} keeps {left} of {len(classes)} channels: {why}")
    return notes
