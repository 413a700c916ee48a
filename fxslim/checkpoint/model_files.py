# SPDX-License-Identifier: Apache-2.0
"""A compressed model in one safetensors file: its weights, and the plans that rebuild its structure.

The user's own code builds the full-size model; ``load`` replays the plans on it and fills in the weights. No
pickle anywhere. Tied weights are stored once. Non-persistent buffers are not stored: they are cut from the
fresh model's. A loaded model keeps the memory format of the model that it is loaded into.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fxslim.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from fxslim.checkpoint.plan_files import plan_from_dict
from fxslim.errors import CheckpointError
from fxslim.graph.surgery.cutting import Surgery
from fxslim.plan.applied_plans import applied, forget_plans, plain_name, remember_plan

FORMAT = "1"
_OPTIMIZER = "optimizer/"


def save(model: nn.Module, path: str | Path, *, optimizer: Optimizer | None = None, extras: Any = None) -> None:
    """Write the model's weights and plans, an optimizer's state, and any JSON data of your own, to one file."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}: only tensors can be saved; put it into extras=")
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and key in first_name:
            tied[plain_name(name)] = first_name[key]
            continue
        first_name[key] = plain_name(name)
        tensors[plain_name(name)] = value.detach().cpu().contiguous().clone()
    metadata = {
        "fxslim": FORMAT,
        "plans": _dump([p.to_dict() for p in applied(model)], "plans"),
        "tied": json.dumps(tied),
    }
    metadata["extras"] = _dump(extras, "extras")
    if optimizer is not None:
        state, scalars = pack_optimizer(optimizer)
        tensors |= {_OPTIMIZER + name: value for name, value in state.items()}
        metadata["optimizer"] = _dump(scalars, "optimizer")
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _dump(data: Any, what: str) -> str:
    try:
        return json.dumps(data)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} can't be written as JSON: {error}") from error


def _read(path: str | Path, map_location: Any = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and parsed metadata of a file that ``save`` wrote."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fxslim") != FORMAT:
                raise CheckpointError(
                    f"{path} is no file of fxslim.save (format {metadata.get('fxslim')!r}, expected {FORMAT!r}); "
                    "load plain weights with model.load_state_dict"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parsed = {key: json.loads(metadata[key]) for key in metadata if key != "fxslim"}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    if map_location is not None:
        tensors = {name: value.to(map_location) for name, value in tensors.items()}
    return tensors, parsed


def read_extras(path: str | Path) -> Any:
    """The data that ``save(..., extras=...)`` was given."""
    return _read(path)[1].get("extras")


def load(
    model: nn.Module, path: str | Path, *, optimizer: Optimizer | None = None, map_location: Any = None
) -> nn.Module:
    """Rebuild a saved model on a fresh full-size one, in place; after any error that one is as it was."""
    if applied(model):
        raise CheckpointError(f"{len(applied(model))} plans are applied to this model already: load into a fresh one")
    tensors, metadata = _read(path, map_location)
    state = {name: value for name, value in tensors.items() if not name.startswith(_OPTIMIZER)}
    state |= {name: state[first] for name, first in metadata["tied"].items()}
    if optimizer is not None:
        _check_optimizer(optimizer, metadata, path)
    done: list[Surgery] = []
    before = {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        for data in metadata["plans"]:
            plan = plan_from_dict(data)
            done.append(plan.cut_model(model, optimizer, values=False))
            remember_plan(model, plan)
        _fill(model, state, path)
        if optimizer is not None:
            _fill_optimizer(optimizer, tensors, metadata)
    except BaseException:
        forget_plans(model)
        for surgery in reversed(done):
            surgery.undo()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in before:
                    value.copy_(before[name])
        raise
    return model


def _fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Copy the weights in, after everything was checked."""
    wanted = {plain_name(name): value for name, value in model.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointError(f"{path} does not fit this model: it lacks {missing[:5]}, and has {unknown[:5]} beside")
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            raise CheckpointError(
                f"{path} does not fit this model: {name} is {tuple(state[name].shape)} there, {tuple(value.shape)} here"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(state[name])


def _check_optimizer(optimizer: Optimizer, metadata: dict[str, Any], path: str | Path) -> None:
    if "optimizer" not in metadata:
        raise CheckpointError(f"{path} was saved without an optimizer")
    if metadata["optimizer"]["kind"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} has the state of {metadata['optimizer']['kind']}, not of {type(optimizer).__name__}"
        )


def _fill_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    state = {name.removeprefix(_OPTIMIZER): value for name, value in tensors.items() if name.startswith(_OPTIMIZER)}
    unpack_optimizer(optimizer, state, metadata["optimizer"])
