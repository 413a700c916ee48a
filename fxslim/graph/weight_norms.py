# SPDX-License-Identifier: Apache-2.0
"""Weight norm: a weight that is computed from a gain and a direction, and still has channels that can go.

The weight is ``gain * direction / norm(direction)``, with a norm for each entry of one dim, or one for all. It has
the channels of its direction; the gain loses entries only along its own dim. Where other channels go the norms get
smaller, and the gains with them, so that what is left of the weight is what it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as _Hook
from torch.nn.utils.weight_norm import remove_weight_norm

# Layers that hand several weights to one function, by themselves.
_BY_THEMSELVES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


@dataclass(frozen=True, kw_only=True)
class WeightNorm:
    """A layer, the name of its weight in its own code, the parameters behind it, and the dim that has many norms.

    ``dim`` is None where the norm is over everything.
    """

    layer: str
    weight: str
    gain: str
    direction: str
    dim: int | None


def find_weight_norms(model: nn.Module) -> tuple[WeightNorm, ...]:
    """Weights whose channels can go although they are computed.

    Those of recurrent layers and attention, and those that share their parameters with another, are not among them.

    >>> find_weight_norms(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))))[0].direction
    '0.parametrizations.weight.original1'
    """
    names = {id(state): name for name, state in [*model.named_parameters(), *model.named_buffers()]}
    found = [
        WeightNorm(layer=layer, weight=weight, gain=names[id(gain)], direction=names[id(direction)], dim=dim)
        for layer, module in model.named_modules()
        for weight, gain, direction, dim in _own(module)
    ]
    uses = [name for norm in found for name in (norm.gain, norm.direction)]
    shared = {norm.layer for norm in found if uses.count(norm.gain) + uses.count(norm.direction) > 2}
    return tuple(norm for norm in found if norm.layer not in shared)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, int | None]]:
    """The weight norms of a module, unless something else computes its weights too."""
    hooks = list(module._forward_pre_hooks.values())
    others = any(isinstance(hook, SpectralNorm | BasePruningMethod) for hook in hooks)
    if others or isinstance(module, _BY_THEMSELVES):
        return
    made: list[tuple[str, Any]] = []
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        made = list(module.parametrizations.items())
    if any([type(step) for step in steps] != [_WeightNorm] for _, steps in made):
        return
    for weight, steps in made:
        yield weight, steps.original0, steps.original1, _normed_dim(steps[0].dim, steps.original1)
    for hook in hooks:
        if isinstance(hook, _Hook):
            gain, direction = getattr(module, f"{hook.name}_g"), getattr(module, f"{hook.name}_v")
            yield hook.name, gain, direction, _normed_dim(hook.dim, direction)


def _normed_dim(dim: int, direction: Tensor) -> int | None:
    """As torch means it: -1 is no dim."""
    return None if dim == -1 else dim % direction.dim()


def layer_states(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Parameters and buffers of a module by the names in its code, with those in its state; a direction is a weight.

    >>> states = layer_states(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    >>> {name: local for name, (local, _) in states.items()}
    {'bias': 'bias', 'weight': 'parametrizations.weight.original1'}
    """
    states = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    found = {name: (name, state) for name, state in states}
    for weight, _, direction, _ in _own(module):
        hooked = f"{weight}_v" in found
        found[weight] = f"{weight}_v" if hooked else f"parametrizations.{weight}.original1", direction
    return found


def hooked_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights that a hook computes before each forward and leaves as attributes, from what the module has now."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook)]
    with torch.no_grad():
        return {hook.name: hook.compute_weight(module) for hook in hooks}


def make_plain(module: nn.Module) -> None:
    """Parameters in the place of the weights of a layer under weight norm.

    Torch's own way changes the class, which a copy shares with its original.
    """
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        weights = {name: getattr(module, name).detach() for name in module.parametrizations}
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight))
    for hook in [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook)]:
        remove_weight_norm(module, hook.name)


def norms_of(direction: Tensor, dim: int | None) -> Tensor:
    """Euclidean norms in float64, in the shape of the gain.

    >>> norms_of(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 0).flatten()
    tensor([5., 2.], dtype=torch.float64)
    """
    others = [d for d in range(direction.dim()) if d != dim]
    if not others:
        return direction.double().abs()
    return torch.linalg.vector_norm(direction, dim=others, keepdim=dim is not None, dtype=torch.float64)


def computed_weight(gain: Tensor, direction: Tensor, dim: int | None) -> Tensor:
    """The weight that a layer computes with, in float64."""
    return gain.double() * (direction.double() / norms_of(direction, dim))
