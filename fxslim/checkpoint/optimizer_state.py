# SPDX-License-Identifier: Apache-2.0
"""An optimizer's state as tensors with names and JSON."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fxslim.errors import CheckpointError


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State tensors by ``<index>/<key>``, and the rest as plain data."""
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value.detach().cpu().contiguous().clone()
            else:
                scalars[f"{index}/{key}"] = value
    groups = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()} for group in saved["param_groups"]
    ]
    return tensors, {"kind": type(optimizer).__name__, "scalars": scalars, "groups": groups}


def unpack_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    """Put back what ``pack_optimizer`` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *data["scalars"].items()]:
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in data["groups"]]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise CheckpointError(f"the saved optimizer does not fit this one: {error}") from error
