# SPDX-License-Identifier: Apache-2.0
"""Layers that a user names: by name, by glob, by type; a container stands for all that is in it."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from fxslim.errors import ConfigError, unknown_name

Setting = TypeVar("Setting")
Chosen = str | type | Iterable[str | type]


def chosen_layers(model: nn.Module, chosen: Chosen, argument: str) -> set[str]:
    """Names of all modules that ``chosen`` stands for; an error tells the nearest names, and which argument it was.

    >>> sorted(chosen_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [nn.Linear, "1"], "skip"))
    ['0', '1']
    """
    modules = dict(model.named_modules())
    found: set[str] = set()
    for item in [chosen] if isinstance(chosen, str | type) else chosen:
        found |= _matches(modules, item, argument)
    return found


def settings_by_layer(model: nn.Module, settings: Mapping[str | type, Setting], argument: str) -> dict[str, Setting]:
    """The setting of each module that a key stands for; later keys replace earlier ones.

    >>> settings_by_layer(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {nn.Linear: 0.5, "1": 0.25}, "overrides")
    {'0': 0.5, '1': 0.25}
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{argument} must be a dict of layers, got a {type(settings).__name__}")
    modules = dict(model.named_modules())
    found: dict[str, Setting] = {}
    for item, setting in settings.items():
        found |= dict.fromkeys(sorted(_matches(modules, item, argument)), setting)
    return found


def _matches(modules: Mapping[str, nn.Module], item: Any, argument: str) -> set[str]:
    if isinstance(item, type):
        return {name for name, module in modules.items() if isinstance(module, item)}
    if not isinstance(item, str):
        raise ConfigError(f"{argument} takes names, globs and types of layers, got {item!r}")
    found = {name for name in modules if name == item or fnmatch.fnmatchcase(name, item)}
    if not found:
        raise ConfigError(f"{argument}: " + unknown_name("layer", item, filter(None, modules)))
    return {name for name in modules if any(name == f or not f or name.startswith(f + ".") for f in found)}
