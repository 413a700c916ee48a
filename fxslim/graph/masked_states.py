# SPDX-License-Identifier: Apache-2.0
"""Weights that a buffer masks before use: the layer's weight is still the parameter, and the mask is cut with it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def masked_state(func: Any, args: tuple[Any, ...], states: Mapping[int, str]) -> tuple[Tensor, Tensor] | None:
    """The parameter and its mask, where an operator multiplies the two or fills what is masked with 0.

    ``states`` has the names of parameters and buffers by ``id``. The mask is a buffer of the parameter's shape.
    """
    name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
    if name == "where" and len(args) == 3 and _is_zero(args[2]):
        pairs = [(args[1], args[0])]
    elif name == "mul":
        pairs = [(args[0], args[1]), (args[1], args[0])]
    else:
        return None
    for weight, mask in pairs:
        if not (isinstance(weight, nn.Parameter) and isinstance(mask, Tensor)) or isinstance(mask, nn.Parameter):
            continue
        if weight.shape == mask.shape and weight.dim() and id(weight) in states and id(mask) in states:
            return weight, mask
    return None


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_meta and not value.is_complex() and value.item() == 0
    return isinstance(value, int | float) and value == 0
