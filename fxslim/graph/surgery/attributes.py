# SPDX-License-Identifier: Apache-2.0
"""Module attributes that repeat the sizes of parameters: one function for each family of modules."""

from collections.abc import Callable
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
