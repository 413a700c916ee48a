# SPDX-License-Identifier: Apache-2.0
"""Sizes that the user's modules keep for themselves, as attributes or in objects such as a configuration."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from fxslim.errors import PlanError
from fxslim.graph.size_checks import NewAttribute


def changed_attributes(model: nn.Module, new_sizes: Sequence[NewAttribute]) -> list[tuple[nn.Module, str, Any]]:
    """New values of whole attributes. An object that others may hold too is copied with the new number in it."""
    values: dict[tuple[nn.Module, str], Any] = {}
    modules = dict(model.named_modules())
    inside = {_without_wrapper(name): module for name, module in modules.items()}
    for new in new_sizes:
        (name, _, key), item = new.attribute.name.partition("."), new.attribute.item
        near = (modules.get(new.attribute.module), inside.get(_without_wrapper(new.attribute.module)))
        owners = [owner for owner in near if owner is not None]
        held = [values.get((owner, name), getattr(owner, name, None)) for owner in owners]
        found = [getattr(value, key, None) for value in held] if key else held
        sizes = [_size_in(value, item) for value in found]
        if new.before not in sizes:
            raise PlanError(
                f"the plan does not fit this model: {new.attribute} is {sizes[0] if sizes else None}, "
                f"the plan was made for {new.before}"
            )
        place = sizes.index(new.before)
        after = _with_item(found[place], item, new.after)
        values[owners[place], name] = _with_number(held[place], key, after) if key else after
    return [(module, name, value) for (module, name), value in values.items()]


def _with_item(old: Any, item: int | None, after: int) -> Any:
    if item is None:
        return after
    assert isinstance(old, tuple | list)
    return type(old)([*old[:item], after, *old[item + 1 :]])


def _with_number(held: Any, key: str, after: Any) -> Any:
    """A copy of an object with another number; past its ``__setattr__``, which may refuse."""
    other = copy.copy(held)
    vars(other)[key] = after
    return other


def _without_wrapper(name: str) -> str:
    return (name + ".").removeprefix("module.").removeprefix("_orig_mod.")[:-1]


def _size_in(value: Any, item: int | None) -> Any:
    if item is None:
        return value
    return value[item] if isinstance(value, tuple | list) and item < len(value) else None
