# SPDX-License-Identifier: Apache-2.0
"""Example inputs in every form that a user may give them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxslim.errors import ConfigError


class Inputs:
    """Positional and keyword arguments of one forward.

    >>> Inputs(1, [torch.ones(2)], flag=True)
    Inputs(1, [Tensor(2,)], flag=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def run(self, model: nn.Module) -> Any:
        """The model's outputs for these inputs."""
        return model(*self.args, **self.kwargs)

    @property
    def have_values(self) -> bool:
        """Whether no tensor is on the meta device."""
        return not any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((self.args, self.kwargs)))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with every tensor changed by a function."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Inputs(*tree_map(changed, self.args), **tree_map(changed, self.kwargs))

    def copied(self) -> "Inputs":
        """The same with cloned tensors, for a model that may change its inputs."""
        return self.with_tensors(torch.clone)

    def in_double(self) -> "Inputs":
        """The same with floating tensors in float64."""
        return self.with_tensors(lambda value: value.double() if value.is_floating_point() else value)

    def __repr__(self) -> str:
        parts = [_shown(a) for a in self.args] + [f"{k}={_shown(v)}" for k, v in self.kwargs.items()]
        return f"Inputs({', '.join(parts)})"


def output_tensors(outputs: Any) -> list[Tensor]:
    """All tensors in what a model returned: containers, dataclasses and plain objects are looked into."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is None or isinstance(value, str | bytes | int | float | complex) or id(value) in seen:
            return
        else:
            seen.add(id(value))
            leaves: list[Any] = tree_leaves(value)
            is_leaf = len(leaves) == 1 and leaves[0] is value
            inside = list(getattr(value, "__dict__", {}).values()) if is_leaf else leaves
            for item in inside:
                look(item)

    look(outputs)
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_shown, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown(item)}" for key, item in value.items()) + "}"
    return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def as_inputs(inputs: Any) -> list[Inputs]:
    """A tensor, a tuple of positional arguments, a dict of keyword arguments, ``Inputs``, or a list of those.

    >>> as_inputs([(1, 2), {"x": 3}])
    [Inputs(1, 2), Inputs(x=3)]
    """
    if isinstance(inputs, list):
        if not inputs:
            raise ConfigError("inputs is an empty list: give at least one example")
        return [one for item in inputs for one in as_inputs(item)]
    if isinstance(inputs, Inputs):
        return [inputs]
    if isinstance(inputs, Mapping):
        return [Inputs(**inputs)]
    if isinstance(inputs, tuple):
        return [Inputs(*inputs)]
    return [Inputs(inputs)]
