# SPDX-License-Identifier: Apache-2.0
"""Masked networks for the ranking task: ours, torch.ao's, and a plain mask of torch.nn.utils.prune."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fxslim
from fxslim.patterns import as_pattern
from fxslim.patterns.blocks import Block
from fxslim.patterns.n_of_m import NM

Batches = list[tuple[Tensor, Tensor]]


def masked_layers(model: nn.Module, pattern: str) -> list[str]:
    """What can follow the pattern but the first layer and the last: in a transformer linear layers only."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)][1:-1]
    linear = [name for name in found if isinstance(model.get_submodule(name), nn.Linear)]
    found = linear or found
    plan = fxslim.plan_sparsity(model, pattern, layers=found, ineligible="ignore")
    return [one.name.removesuffix(".weight") for one in plan.weights]


def ours(method: str, pattern: str, base: nn.Module, batches: Batches, layers: list[str]) -> nn.Module:
    """``fxslim.sparsify``; "+ste": masks that follow the weights in training; "+permute": channels reordered first."""
    name, _, extra = method.partition("+")
    more: dict[str, Any] = {
        "": {}, "ste": {"gradient": "sr_ste", "update_freq": 50},
        "permute": {"permute": True, "example_inputs": batches[0][0][:2]},
    }[extra]  # fmt: skip
    return fxslim.sparsify(copy.deepcopy(base), pattern, layers=layers, method=name, data=batches, **more)


def plain_mask(pattern: str, base: nn.Module, batches: Batches, layers: list[str]) -> nn.Module:
    """The smallest magnitudes masked by torch.nn.utils.prune, written with nothing but torch."""
    weights = {name: base.get_submodule(name).get_parameter("weight").detach() for name in layers}
    return _masked(base, {name: _plain(weight, as_pattern(pattern)) for name, weight in weights.items()})


def _masked(base: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with these masks held on by torch.nn.utils.prune, whose state tells them."""
    model = copy.deepcopy(base)
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask.float())
    return model


def _plain(weight: Tensor, pattern: Any) -> Tensor:
    flat = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    if isinstance(pattern, NM):
        rows = flat.abs().movedim(1, -1)
        padded = nn.functional.pad(rows, (0, -rows.shape[-1] % pattern.m)).unflatten(-1, (-1, pattern.m))
        best = padded.topk(pattern.n, dim=-1).indices
        mask = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)[..., : rows.shape[-1]]
        return mask.movedim(-1, 1).reshape(weight.shape)
    assert isinstance(pattern, Block)
    corners = [
        (rows, columns, position)
        for rows in torch.arange(flat.shape[0]).split(pattern.cout)
        for columns in torch.arange(flat.shape[1]).split(pattern.cin)
        for position in range(flat.shape[2])
    ]
    sums = torch.stack([flat[r][:, c, p].abs().mean() for r, c, p in corners])
    mask = torch.ones_like(flat, dtype=torch.bool)
    for i in sums.argsort()[: min(round(0.5 * len(sums)), len(sums) - 1)].tolist():
        rows, columns, position = corners[i]
        mask[rows.unsqueeze(1), columns, position] = False
    return mask.reshape(weight.shape)


def torch_ao(pattern: str, base: nn.Module, batches: Batches, layers: list[str]) -> nn.Module:
    """torch.ao's WeightNormSparsifier, which knows matrices only."""
    from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    model, chosen = copy.deepcopy(base), as_pattern(pattern)
    if any(model.get_submodule(name).get_parameter("weight").dim() != 2 for name in layers):
        raise fxslim.FxslimError("torch.ao's sparsifier takes the last two dims: those of a convolution are its kernel")
    shape: dict[str, Any] = {"sparsity_level": 0.5, "sparse_block_shape": (64, 32), "zeros_per_block": 64 * 32}
    if isinstance(chosen, NM):
        shape = {"sparsity_level": 1.0, "sparse_block_shape": (1, chosen.m), "zeros_per_block": chosen.m - chosen.n}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = WeightNormSparsifier(**shape)
        sparsifier.prepare(model, config=[{"tensor_fqn": f"{name}.weight"} for name in layers])
        sparsifier.step()
    # Its own parametrization keeps the mask out of the state.
    found: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    return _masked(base, {name: layer.parametrizations.weight[0].mask for name, layer in found.items()})


RIVALS: dict[str, Callable[[str, nn.Module, Batches, list[str]], nn.Module]] = {
    "torch.ao": torch_ao,
    "plain mask": plain_mask,
}


def share_of_zeros(model: nn.Module, layers: Iterable[str]) -> float:
    """Of these layers' weights, as the model computes with them."""
    zeros = total = 0
    for name in layers:
        layer: Any = model.get_submodule(name)
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())
        weight = layer.masked() if hasattr(layer, "masked") else layer.weight
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / max(total, 1)
