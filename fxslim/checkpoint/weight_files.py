# SPDX-License-Identifier: Apache-2.0
"""Weights from other people's files: safetensors, or torch.save without pickled code."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fxslim.errors import CheckpointError

# Keys under which training scripts keep the weights.
_INSIDE = ("state_dict", "model_state_dict", "model")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, by name; files that would run code are refused."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read: {type(error).__name__}: {error}; expected safetensors, or a state_dict that "
            "torch.load(path, weights_only=True) accepts"
        ) from error
    for key in _INSIDE:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} holds a {type(found).__name__} without tensors, expected a state_dict")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
