# SPDX-License-Identifier: Apache-2.0
"""Which plans were applied to a model, and whether a plan fits one."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxslim.errors import PlanError
from fxslim.graph.recording import named_states
from fxslim.graph.surgery.changes import Changes

_ATTRIBUTE = "_fxslim_plans"
_PREFIXES = ("module.", "_orig_mod.")


def applied(model: nn.Module) -> list[Any]:
    """The plans applied to a model, in order."""
    return list(getattr(model, _ATTRIBUTE, ()))


def remember_plan(model: nn.Module, plan: Any, changes: Changes) -> None:
    """Note that a plan was applied."""
    changes.set_attribute(model, _ATTRIBUTE, [*applied(model), plan])


def plain_name(name: str) -> str:
    """A state's name without the prefixes of wrappers.

    >>> plain_name("module._orig_mod.conv1.weight")
    'conv1.weight'
    """
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without prefixes of wrappers; as it is where two would become the same.

    >>> plain_names(["module.weight", "module.bias"])
    {'module.weight': 'weight', 'module.bias': 'bias'}
    >>> plain_names(["module.weight", "weight"])
    {'module.weight': 'module.weight', 'weight': 'weight'}
    """
    plain = {name: plain_name(name) for name in names}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def names_in(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The model's own name of each state that a plan knows.

    Raises unless the model has exactly the states that the plan was made for; names the first that differs.
    Prefixes of wrappers may differ.
    """
    found = {name: tuple(state.shape) for name, state in named_states(model)}
    if found.keys() == shapes.keys():
        own = {name: name for name in shapes}
    else:
        by_plain_name = {plain: name for name, plain in plain_names(found).items()}
        own = {name: by_plain_name.get(plain, "") for name, plain in plain_names(shapes).items()}
    for name, shape in shapes.items():
        if not own[name]:
            raise PlanError(
                f"the plan does not fit this model: it has no {name}, which the plan knows as {tuple(shape)}; "
                "apply a plan to the model that it was made for"
            )
        if found[own[name]] != tuple(shape):
            raise PlanError(
                f"the plan does not fit this model: {name} is {found[own[name]]}, "
                f"the plan was made for {tuple(shape)}; "
                "apply a plan once, to a model of the shapes that it was made for"
            )
    for unknown in sorted(found.keys() - own.values()):
        raise PlanError(
            f"the plan does not fit this model: the plan does not know {unknown} {found[unknown]}; "
            "apply a plan to the model that it was made for"
        )
    return own


def module_in(model: nn.Module, name: str) -> str:
    """The model's own name of a module that a plan knows; prefixes of wrappers may differ.

    >>> module_in(nn.ModuleDict({"module": nn.ModuleDict({"head": nn.Linear(2, 2)})}), "head")
    'module.head'
    """
    own = dict(model.named_modules())
    if name in own:
        return name
    found = [other for other in own if _plain_module(other) == _plain_module(name)]
    if not found:
        raise PlanError(
            f"the plan does not fit this model: it has no module {name}; apply a plan to the model that it was made for"
        )
    return found[0]


def _plain_module(name: str) -> str:
    return plain_name(f"{name}.").strip(".")
