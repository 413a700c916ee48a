# SPDX-License-Identifier: Apache-2.0
"""Example inputs in every form that a user may give them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxslim.errors import ConfigError


class Inputs:
    """Positional and keyword arguments of one forward.

    >>> Inputs(1, flag=True)
    Inputs(1, flag=True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def run(self, model: nn.Module) -> Any:
        """The model's outputs for these inputs."""
        return model(*self.args, **self.kwargs)

    def __repr__(self) -> str:
        parts = [_shown(a) for a in self.args] + [f"{k}={_shown(v)}" for k, v in self.kwargs.items()]
        return f"Inputs({', '.join(parts)})"


def _shown(value: Any) -> str:
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
