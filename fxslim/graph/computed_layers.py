# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are computed from other parameters: parametrizations and the hooks that came before them."""

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxslim.graph.weight_norms import find_weight_norms

# What takes each kind of hook away.
_REMOVERS: dict[type, tuple[str, str]] = {
    WeightNorm: ("weight norm", "torch.nn.utils.remove_weight_norm"),
    SpectralNorm: ("spectral norm", "torch.nn.utils.remove_spectral_norm"),
    BasePruningMethod: ("a mask", "torch.nn.utils.prune.remove"),
}


def find_computed_layers(model: nn.Module) -> dict[str, str]:
    """What computes the weights of each such layer, and how to make parameters of them.

    >>> net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    >>> find_computed_layers(net)["0"].partition(":")[0]
    '0.weight is made by _WeightNorm'
    """
    return {name: reason for name, module in model.named_modules() if (reason := _reason(name, module))}


def find_fixed_layers(model: nn.Module) -> dict[str, str]:
    """Those of them that keep all channels: weight norm lets them go."""
    followed = {norm.layer for norm in find_weight_norms(model)}
    return {name: reason for name, reason in find_computed_layers(model).items() if name not in followed}


def _reason(name: str, module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for tensor, steps in module.parametrizations.items():
            assert isinstance(steps, nn.ModuleList)
            return (
                f"{name}.{tensor} is made by {', '.join(type(step).__name__ for step in steps)}: call "
                f"torch.nn.utils.parametrize.remove_parametrizations on {name} before pruning"
            )
    for hook in module._forward_pre_hooks.values():
        for kind, (what, remover) in _REMOVERS.items():
            if isinstance(hook, kind):
                return f"{name} has {what}: call {remover} on {name} before pruning"
    return ""
