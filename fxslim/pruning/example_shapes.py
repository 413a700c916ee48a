# SPDX-License-Identifier: Apache-2.0
"""Example inputs in a file: their shapes and types, not their values."""

from typing import Any

import torch
from torch import Tensor

from fxslim.graph.inputs import Inputs


def describe_inputs(inputs: tuple[Inputs, ...]) -> list[Any] | None:
    """Plain data for tensors in tuples, lists and dicts; None where there is anything else.

    >>> describe_inputs((Inputs(torch.zeros(1, 3), scale=2),))
    [{'tuple': [{'tuple': [{'float32': [1, 3]}]}, {'dict': {'scale': {'value': 2}}}]}]
    """
    try:
        return [_described((example.args, example.kwargs)) for example in inputs]
    except TypeError:
        return None


def described_inputs(data: list[Any] | None) -> tuple[Inputs, ...]:
    """Inputs of these shapes: values in [0, 1) for floating tensors, 0 for all others; always the same."""
    generator = torch.Generator().manual_seed(0)
    return tuple(Inputs(*args, **kwargs) for args, kwargs in (_made(item, generator) for item in data or ()))


def _described(value: Any) -> dict[str, Any]:
    if isinstance(value, Tensor):
        return {str(value.dtype).removeprefix("torch."): list(value.shape)}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_described(item) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(item) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _made(data: dict[str, Any], generator: torch.Generator) -> Any:
    ((kind, content),) = data.items()
    if kind == "value":
        return content
    if kind in ("tuple", "list"):
        items = [_made(item, generator) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: _made(item, generator) for key, item in content.items()}
    dtype = getattr(torch, kind)
    if not dtype.is_floating_point:
        return torch.zeros(content, dtype=dtype)
    return torch.rand(content, generator=generator, dtype=torch.float64).to(dtype)
