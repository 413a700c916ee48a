# SPDX-License-Identifier: Apache-2.0
"""The values of a module's parameters and buffers while torch.export runs it on stand-ins without values."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from fxslim.errors import ExportError

_Module = TypeVar("_Module", bound=nn.Module)


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Nothing that is done in here is written down, not even that gradients are switched off."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def real_twin(module: _Module) -> _Module:
    """The module itself, or, where stand-ins are in its place, a shallow copy with the real parameters and buffers.

    >>> layer = nn.Linear(2, 2)
    >>> real_twin(layer) is layer
    True
    """
    states = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not any(isinstance(state, FakeTensor) for state in states):
        return module
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {name: _real(state) for name, state in getattr(module, kind).items()}
    return twin


def _real(state: Tensor | None) -> Tensor | None:
    if not isinstance(state, FakeTensor):
        return state
    converter = state.fake_mode.fake_tensor_converter.meta_converter
    known = converter.describer.lookup_tensor
    for real in list(known):
        if isinstance(real, Tensor) and converter.tensor_memo.get(known[real]) is state:
            return real
    raise ExportError(
        f"torch {torch.__version__} does not tell the values of a {tuple(state.shape)} parameter while it exports: "
        "use fxslim.export_onnx(model, inputs, path)"
    )
