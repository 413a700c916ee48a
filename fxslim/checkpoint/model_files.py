# SPDX-License-Identifier: Apache-2.0
"""A compressed model in one safetensors file: its weights, and the plans that rebuild its structure.

The user's own code builds the full-size model; ``load`` replays the plans on it and fills in the weights. No
pickle anywhere. Tied weights are stored once. Non-persistent buffers are not stored: they are cut from the
fresh model's. A loaded model keeps the memory format of the model that it is loaded into.
"""

import functools
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
from fxslim.graph.surgery.changes import Changes, all_or_nothing
from fxslim.plan.applied_plans import applied, plain_names
from fxslim.plan.file_writing import write_file
from fxslim.plan.plan import Plan

FORMAT = "1"
_OPTIMIZER = "optimizer/"


def save(model: nn.Module, path: str | Path, *, optimizer: Optimizer | None = None, extras: Any = None) -> None:
    """Write the model's weights and plans, an optimizer's state, and any JSON data of your own, to one file."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    state = model.state_dict()
    plain = plain_names(state)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} is a {type(value).__name__}: only tensors can be saved; put it into extras=")
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no values to save; save a model with weights")
        key = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.numel() and key in first_name:
            tied[plain[name]] = first_name[key]
            continue
        first_name[key] = plain[name]
        tensors[plain[name]] = value.detach().cpu().contiguous().clone()
    metadata = {
        "fxslim": FORMAT,
        "plans": _dump([p.to_dict() for p in applied(model)], "plans"),
        "tied": json.dumps(tied),
    }
    metadata["extras"] = _dump(extras, "extras")
    if optimizer is not None:
        kept, scalars = pack_optimizer(optimizer)
        tensors |= {_OPTIMIZER + name: value for name, value in kept.items()}
        metadata["optimizer"] = _dump(scalars, "optimizer")
    write_file(path, lambda temporary: _write(tensors, temporary, metadata))


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


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
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} can't be read: {type(error).__name__}: {error}; it is not a file that fxslim.save wrote, or it is "
            "damaged: save it again (a file of torch.save: torch.load(path, weights_only=True), then load_state_dict)"
        ) from error
    for key, kind in (("plans", list), ("tied", dict)):
        if not isinstance(parsed.get(key), kind):
            raise CheckpointError(f"{path} is damaged: its {key!r} is {parsed.get(key)!r}, expected a {kind.__name__}")
    unknown = sorted(str(first) for first in parsed["tied"].values() if first not in tensors)
    if unknown:
        raise CheckpointError(f"{path} is damaged: weights are tied to {unknown[:5]}, which it does not have")
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

    def rebuild(changes: Changes) -> None:
        for data in metadata["plans"]:
            _plan(data, path).change_model(model, changes, optimizer, values=False)
        _fill(model, state, path, changes)
        if optimizer is not None:
            _fill_optimizer(optimizer, tensors, metadata, path, changes)

    return all_or_nothing(model, rebuild)


def _plan(data: Any, path: str | Path) -> Plan:
    try:
        return plan_from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _fill(model: nn.Module, state: dict[str, Tensor], path: str | Path, changes: Changes) -> None:
    """Copy the weights in, after everything was checked."""
    own = model.state_dict()
    wanted = {plain: own[name] for name, plain in plain_names(own).items()}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not fit this model: it lacks {missing[:5]}, and has {unknown[:5]} beside; "
            "load into the model that was saved, before it was pruned"
        )
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            raise CheckpointError(
                f"{path} does not fit this model: {name} is {tuple(state[name].shape)} there, "
                f"{tuple(value.shape)} here; load into the model that was saved, before it was pruned"
            )
        if value.is_meta:
            raise CheckpointError(
                f"{name} of this model is on the meta device and can't be filled: model.to_empty(device=...) first"
            )
    for name, value in wanted.items():
        before = value.clone()
        changes.make(functools.partial(_copy, value, state[name]), functools.partial(_copy, value, before))


def _copy(target: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _check_optimizer(optimizer: Optimizer, metadata: dict[str, Any], path: str | Path) -> None:
    saved = metadata.get("optimizer")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} was saved without an optimizer: load it without optimizer=")
    if saved.get("kind") != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} has the state of {saved.get('kind')}, not of {type(optimizer).__name__}: "
            f"make a {saved.get('kind')}, or load without optimizer="
        )


def _fill_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], metadata: dict[str, Any], path: str | Path, changes: Changes
) -> None:
    state = {name.removeprefix(_OPTIMIZER): value for name, value in tensors.items() if name.startswith(_OPTIMIZER)}
    before = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    try:
        changes.make(
            functools.partial(unpack_optimizer, optimizer, state, metadata["optimizer"]),
            functools.partial(vars(optimizer).update, before),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the optimizer's state in {path} is damaged: {type(error).__name__}: {error}; load without optimizer="
        ) from error
