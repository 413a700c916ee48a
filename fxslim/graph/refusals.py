# SPDX-License-Identifier: Apache-2.0
"""Models whose parameters or code can't be changed in place: refused by name, with what to do instead."""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fxslim.errors import UnsupportedLayerError
from fxslim.graph.slots import owner

_EXPORTED = "its code has the sizes built in: use the model that was exported, and export it afterwards"
# By the names of classes, so that nothing is imported that the user did not import.
_REFUSED = {
    "DataParallel": "apply before wrapping, on the module inside",
    "DistributedDataParallel": "apply before wrapping, on the module inside",
    "FullyShardedDataParallel": "apply before wrapping, on the module inside",
    "FSDPModule": "apply before fully_shard, on the plain module",
    "ScriptModule": "its code has the sizes built in: use the Python model, and script or trace it afterwards",
    "_StatefulGraphModule": _EXPORTED,
    "ExportedProgram": _EXPORTED,
}
_REFUSED_TENSORS = {
    "FakeTensor": "it has no values and belongs to its mode: build the model on the meta device instead",
    "DTensor": "it is spread over several devices: apply before that",
}


def _base_names(value: object) -> set[str]:
    return {base.__name__ for base in type(value).__mro__}


def refuse_wrapped(model: Any) -> None:
    """Raise for wrappers, compiled forms and tensors whose parameters or sizes can not be replaced under them."""
    for name, module in model.named_modules() if isinstance(model, nn.Module) else [("", model)]:
        for found in sorted(_base_names(module) & _REFUSED.keys()):
            where = f" ({name})" if name else ""
            raise UnsupportedLayerError(f"{type(module).__name__}{where}: {_REFUSED[found]}")
    if not isinstance(model, nn.Module):
        raise UnsupportedLayerError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    for name, state in [*model.named_parameters(), *model.named_buffers()]:
        for found in sorted(_base_names(state.data if not is_lazy(state) else state) & _REFUSED_TENSORS.keys()):
            raise UnsupportedLayerError(f"{name} is a {found}: {_REFUSED_TENSORS[found]}")
        if is_lazy(state):
            raise UnsupportedLayerError(
                f"{owner(name) or type(model).__name__}: {name} has no shape yet, since it is lazy: "
                "call the model once on an example input first"
            )
        if state.is_inference():
            raise UnsupportedLayerError(
                f"{name} was made under torch.inference_mode() and can't be changed: build the model outside of it"
            )


def without_compile_wrapper(model: nn.Module) -> nn.Module:
    """The module inside of what ``torch.compile`` returns: it is the same parameters and the user's own class."""
    return without_compile_wrapper(model._orig_mod) if type(model).__name__ == "OptimizedModule" else model  # type: ignore[arg-type]
