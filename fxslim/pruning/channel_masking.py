# SPDX-License-Identifier: Apache-2.0
"""Channels held at 0 in the full-size model while it trains, to be removed later.

The entries are zeroed in place, before every forward and every ``state_dict()``, and their gradients are zeroed
too. A parametrization would rename parameters, and a mask multiplied into the weight would leave other values
in the saved state than those that the model computes with. Hooks hold no reference to the model but are given
it, and find a copied model's parameters by name: a deep copy is masked like the original.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fxslim.graph.recording import named_states
from fxslim.graph.slots import owner
from fxslim.graph.surgery.cutting import Cut
from fxslim.graph.weight_norms import find_weight_norms
from fxslim.pruning.removals import silent_entries
from fxslim.pruning.silencing import NormsOverKept

# Their vectors follow channels without mixing them.
_MIXING_NOTHING = (_NormBase, _ConvNd, nn.Linear, nn.PReLU)


class MutedGradient:
    """A hook of one parameter: the gradient of its masked entries is 0."""

    def __init__(self, removed: list[Tensor]) -> None:
        self.removed = removed

    def __call__(self, gradient: Tensor) -> Tensor:
        for gone in self.removed:
            gradient = gradient.masked_fill(gone.to(gradient.device), 0)
        return gradient


class ChannelMask:
    """What holds the entries that ``cuts`` remove at 0 in the model that it is attached to."""

    def __init__(self, model: nn.Module, cuts: tuple[Cut, ...]) -> None:
        self.cuts = cuts
        states = dict(named_states(model))
        self.removed = silent_entries(cuts, states, find_weight_norms(model))
        self.mixes = any(
            (cut.name not in states or states[cut.name].dim() == 1)
            and not isinstance(model.get_submodule(owner(cut.name)), _MIXING_NOTHING)
            for cut in cuts
        )
        self.handles: list[RemovableHandle] = []
        # Open from a forward's begin to its end.
        self.norms: list[NormsOverKept] = []

    def attach(self, model: nn.Module) -> None:
        """Start to hold the entries at 0."""
        self.handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]
        self.enforce(model)

    def detach(self, model: nn.Module) -> None:
        """Let go of the entries; they are 0 until something changes them."""
        self.enforce(model)
        while self.handles:
            self.handles.pop().remove()
        for _, state in named_states(model):
            hooks = state._backward_hooks or {}
            for key in [key for key, hook in hooks.items() if isinstance(hook, MutedGradient)]:
                del hooks[key]

    def attach_again(self, model: nn.Module) -> None:
        """Undo a ``detach``, even one that stopped half-way."""
        self.detach(model)
        self.attach(model)

    def enforce(self, model: nn.Module) -> None:
        """Zero the entries, by ``.data`` so that a graph that is still to be walked backward stays valid."""
        states = dict(named_states(model))
        for name, removed in self.removed.items():
            state = states[name]
            removed[:] = [gone.to(state.device) for gone in removed]
            for gone in removed:
                state.data.masked_fill_(gone, 0)
            hooks = (state._backward_hooks or {}).values()
            if state.requires_grad and not any(isinstance(hook, MutedGradient) for hook in hooks):
                state.register_hook(MutedGradient(removed))

    def mute_optimizer(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Zero the entries of what an optimizer keeps, so that momentum from before moves nothing."""
        states = dict(named_states(model))
        for name, removed in self.removed.items():
            for value in optimizer.state.get(states[name], {}).values():
                if isinstance(value, Tensor) and value.shape == states[name].shape:
                    for gone in removed:
                        value.masked_fill_(gone.to(value.device), 0)

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        # Not a part of the forward: a recording should not see it.
        with _disable_current_modes():
            self.enforce(model)
        if self.mixes:
            self.norms.append(NormsOverKept(model, self.cuts))
            self.norms[-1].__enter__()

    def _after_forward(self, model: nn.Module, args: Any, outputs: Any) -> None:
        if self.norms:
            self.norms.pop().__exit__(None, None, None)

    def _before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        with torch.no_grad():
            self.enforce(model)


def mask_of(model: nn.Module) -> ChannelMask | None:
    """The mask that is attached to a model."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ChannelMask):
            return owner
    return None


def unmasked_copy(model: nn.Module) -> nn.Module:
    """A deep copy without a mask; masked entries are 0 in it.

    Attributes that hang in an autograd graph, such as weight norm's weight, are copied by value.
    """
    attributes = [value for module in model.modules() for value in tree_leaves(vars(module))]
    inner = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    result = copy.deepcopy(model, {id(value): value.detach().clone() for value in inner})
    mask = mask_of(result)
    if mask is not None:
        mask.detach(result)
    return result
