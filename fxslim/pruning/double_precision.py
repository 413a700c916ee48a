# SPDX-License-Identifier: Apache-2.0
"""A model's copies in float64, free of masks."""

import copy

from torch import nn

from fxslim.errors import UnsupportedLayerError
from fxslim.graph.recording import named_states
from fxslim.pruning.channel_masking import unmasked_copy


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
