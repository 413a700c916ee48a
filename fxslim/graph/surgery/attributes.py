# SPDX-License-Identifier: Apache-2.0
"""Module attributes that repeat the sizes of parameters: one function for each family of modules."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

# New attribute values, from the module and its new tensors by their local names.
Updater = Callable[[nn.Module, dict[str, Tensor]], dict[str, Any]]
UPDATERS: list[tuple[tuple[type, ...], Updater]] = []


def family(*kinds: type) -> Callable[[Updater], Updater]:
    """Register the updater of modules of these types and their subclasses."""

    def register(updater: Updater) -> Updater:
        UPDATERS.append((kinds, updater))
        return updater

    return register


def new_attributes(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a module's attributes must become when its tensors become these."""
    for kinds, updater in UPDATERS:
        if isinstance(module, kinds):
            return updater(module, tensors)
    return {}


def new_size(value: int | tuple[int, ...], kept: Mapping[int, int]) -> int | tuple[int, ...]:
    """A size whose dims keep only so many entries.

    >>> new_size((8, 4, 4), {0: 6}), new_size(8, {0: 6})
    ((6, 4, 4), 6)
    """
    if isinstance(value, int):
        return kept[0]
    return tuple(kept.get(d, size) for d, size in enumerate(value))
