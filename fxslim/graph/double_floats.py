# SPDX-License-Identifier: Apache-2.0
"""Running models in float64: wherever the forward asks for another float, it gets float64."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_CASTS = ("float", "half", "bfloat16")


class _EveryFloatIsDouble(TorchFunctionMode):
    """Floats are float64, but say that they are ``usual``: code that asks for that dtype, and no other, goes on."""

    def __init__(self, usual: torch.dtype) -> None:
        super().__init__()
        self.usual = usual

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is torch.Tensor.dtype:
            dtype = func(*args)
            return self.usual if dtype == torch.float64 else dtype
        if getattr(func, "__name__", "") in _CASTS and isinstance(args[0], Tensor):
            return args[0].double()
        args, kwargs = tree_map(_widest, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widest(value: Any) -> Any:
    if not isinstance(value, torch.dtype):
        return value
    return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Tensors that the forward makes, and its casts between floating types, are float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _EveryFloatIsDouble(default):
            yield
    finally:
        torch.set_default_dtype(default)
