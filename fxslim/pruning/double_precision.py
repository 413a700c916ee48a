# SPDX-License-Identifier: Apache-2.0
"""A model's copies in float64, and running them so: wherever the forward asks for another float, it gets float64."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fxslim.errors import UnsupportedLayerError
from fxslim.graph.recording import named_states
from fxslim.pruning.channel_masking import unmasked_copy

_CASTS = ("float", "half", "bfloat16")


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64, free of masks."""
    for name, state in named_states(model):
        if state.is_meta:
            raise UnsupportedLayerError(
                f"verify compares values, but {name} is on the meta device and has none: verify a model with weights"
            )
    try:
        return unmasked_copy(model).double()
    except Exception as error:
        raise UnsupportedLayerError(
            f"verify works on copies of the model, but {_uncopied(model)} can't be copied: "
            f"{type(error).__name__}: {error}; set it to None meanwhile, or apply the plan without verify"
        ) from error


def _uncopied(model: nn.Module) -> str:
    """The first attribute that can't be copied."""
    internals = vars(nn.Module()).keys()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in internals:
                try:
                    copy.deepcopy(value)
                except Exception:
                    return f"{name}.{key}".lstrip(".")
    return type(model).__name__


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
