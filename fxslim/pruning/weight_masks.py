# SPDX-License-Identifier: Apache-2.0
"""Masks of weights as users bring them: 0 where a weight, or a whole output channel, is pruned."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.recording import named_states
from fxslim.plan.applied_plans import plain_name

# {layer or parameter: mask}, or {layer: {"weight": mask, "bias": mask or None}}
WeightMasks = Mapping[str, Any]


def masked_entries(model: nn.Module, masks: WeightMasks) -> dict[str, Tensor]:
    """True where masks are 0, for each parameter or buffer that they name, in its own shape.

    A mask of a layer's weight's shape masks the weight. A vector of its output channels masks the layer's whole
    output: rows of the weight, and entries of the bias. Given for a parameter, it masks that one alone.

    >>> masked_entries(nn.Linear(2, 3), {"weight": torch.tensor([1, 0, 1])})
    {'weight': tensor([[False, False],
            [ True,  True],
            [False, False]])}
    """
    states = dict(named_states(model))
    first = {id(state): name for name, state in states.items()}
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {plain_name(name): first[id(state)] for name, state in everything}
    found: dict[str, Tensor] = {}
    for key, value in masks.items():
        if isinstance(value, Mapping):
            parts = {f"{key}.{part}": mask for part, mask in value.items() if mask is not None}
        elif key in names:
            parts = {key: value}
        elif f"{key}.weight" in names:
            parts = {f"{key}.weight": value}
            bias = names.get(f"{key}.bias")
            if bias is not None and value.shape == states[bias].shape != states[names[f"{key}.weight"]].shape:
                parts[f"{key}.bias"] = value
        else:
            layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
            raise ConfigError("masks: " + unknown_name("layer or parameter", key, [*names, *layers]))
        for part, mask in parts.items():
            if part not in names:
                raise ConfigError("masks: " + unknown_name("parameter", part, names))
            gone = _masked(mask, part, states[names[part]], _output_dim(model, names[part]))
            found[names[part]] = gone | found.get(names[part], torch.zeros_like(gone))
    return found


def mask_weights(model: nn.Module, masks: WeightMasks) -> nn.Module:
    """Set the masked weights to 0, in place; no layer becomes smaller by that: ``PruningPlan.from_masks`` does it."""
    states = dict(named_states(model))
    with torch.no_grad():
        for name, gone in masked_entries(model, masks).items():
            states[name].masked_fill_(gone, 0)
    return model


def _output_dim(model: nn.Module, name: str) -> int:
    layer = model.get_submodule(name.rpartition(".")[0])
    return int(isinstance(layer, nn.Embedding | nn.modules.conv._ConvTransposeNd))


def _masked(mask: Any, name: str, state: Tensor, dim: int) -> Tensor:
    mask = torch.as_tensor(mask).detach().to(state.device)
    other = int(((mask != 0) & (mask != 1)).sum())
    if other:
        raise ConfigError(f"masks: {name} has {other} values that are neither 0 nor 1; 1 keeps, 0 removes")
    if mask.shape == state.shape:
        return mask == 0
    if state.dim() < 2 or mask.shape != (state.shape[dim],):
        vector = f" nor of its {state.shape[dim]} output channels" if state.dim() > 1 else ""
        raise ConfigError(f"masks: {name} has shape {tuple(state.shape)}, its mask {tuple(mask.shape)}{vector}")
    return (mask == 0).view([-1 if d == dim else 1 for d in range(state.dim())]).expand(state.shape)
