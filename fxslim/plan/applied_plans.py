# SPDX-License-Identifier: Apache-2.0
"""Which plans were applied to a model, and whether a plan fits one."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxslim.errors import PlanError
from fxslim.graph.recording import named_states

_ATTRIBUTE = "_fxslim_plans"
_PREFIXES = ("module.", "_orig_mod.")


def applied(model: nn.Module) -> list[Any]:
    """The plans applied to a model, in order."""
    return list(getattr(model, _ATTRIBUTE, ()))


def remember_plan(model: nn.Module, plan: Any) -> None:
    """Note that a plan was applied."""
    setattr(model, _ATTRIBUTE, [*applied(model), plan])


def forget_plans(model: nn.Module) -> None:
    """As if no plan had been applied."""
    if hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def plain_name(name: str) -> str:
    """A state's name without the prefixes of wrappers.

    >>> plain_name("module._orig_mod.conv1.weight")
    'conv1.weight'
    """
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def check_fits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the model has exactly the states that a plan was made for; names the first that differs."""
    found = {plain_name(name): tuple(state.shape) for name, state in named_states(model)}
    for name, shape in shapes.items():
        if name not in found:
            raise PlanError(f"the plan does not fit this model: it has no {name}, which the plan knows as {shape}")
        if found[name] != tuple(shape):
            raise PlanError(
                f"the plan does not fit this model: {name} is {found[name]}, the plan was made for {tuple(shape)}"
            )
    for name in found:
        if name not in shapes:
            raise PlanError(f"the plan does not fit this model: the plan does not know {name} {found[name]}")
