# SPDX-License-Identifier: Apache-2.0
"""Cuts parameters and buffers of a model, all or none.

``nn.Parameter`` objects stay the same objects, so optimizers and user code that hold them stay right; the
state that an optimizer keeps for them is cut alike. A graph that was recorded before the cut and is still
alive can't be walked backward any more, new ones can.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxslim.errors import PlanError, UnsupportedLayerError
from fxslim.graph.recording import named_states
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.attributes import new_attributes, new_size
from fxslim.graph.unweighted_norms import find_unweighted_norms


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Entries of one dim that stay, in their new order.

    ``blocks`` > 1: indices run over all blocks of a grouped convolution.
    """

    name: str
    dim: int
    keep: tuple[int, ...]
    blocks: int = 1
    # What the entries are to the layer, as in Slot: producer, consumer, depthwise, follower.
    role: str = "follower"


def cut_tensor(tensor: Tensor, cuts: list[Cut]) -> Tensor:
    """A tensor with only the kept entries, in its memory format."""
    result = tensor.detach()
    for cut in sorted(cuts, key=lambda c: (-c.blocks, c.dim)):
        index = torch.tensor(cut.keep, dtype=torch.long, device=tensor.device)
        result = _cut_blocks(result, cut, index) if cut.blocks > 1 else result.index_select(cut.dim, index)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def _cut_blocks(tensor: Tensor, cut: Cut, index: Tensor) -> Tensor:
    """Each block of output channels reads its own kept inputs: as many as the others, not the same."""
    width = tensor.shape[1]
    per_block = len(cut.keep) // cut.blocks
    blocks = tensor.reshape(cut.blocks, -1, *tensor.shape[1:])
    if per_block * cut.blocks != len(cut.keep):
        raise PlanError(f"{cut.name}: {len(cut.keep)} inputs can't be shared by {cut.blocks} groups")
    chosen = [
        blocks[b].index_select(1, index[b * per_block : (b + 1) * per_block] - b * width) for b in range(cut.blocks)
    ]
    return torch.stack(chosen).flatten(0, 1)


class Surgery:
    """New tensors and attributes, computed first; ``commit`` puts them in, ``undo`` takes them out.

    ``values`` are full-size tensors to cut in place of those that the model has, in any dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        cuts: Sequence[Cut],
        optimizer: Optimizer | None = None,
        *,
        new_sizes: Sequence[NewAttribute] = (),
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.states = dict(named_states(model))
        by_name: dict[str, list[Cut]] = {}
        for cut in cuts:
            by_name.setdefault(cut.name, []).append(cut)
        sizes = {name: by_name.pop(name) for name in list(by_name) if name not in self.states}
        given = {name: value.to(self.states[name].dtype) for name, value in (values or {}).items()}
        full = self.states | given
        self.tensors = {name: cut_tensor(full[name], by_name.get(name, [])) for name in by_name | given}
        self.optimizer_tensors = self._cut_optimizer(by_name)
        self.attributes = [*self._attributes(model), *_cut_sizes(model, sizes), *_user_attributes(model, new_sizes)]
        self.recurrent = {module for module, _, _ in self.attributes if isinstance(module, nn.RNNBase)}
        self.undo_steps: list[Callable[[], None]] = []

    def _cut_optimizer(self, by_name: dict[str, list[Cut]]) -> list[tuple[dict[str, Any], str, Tensor]]:
        changes = []
        state: Mapping[Tensor, dict[str, Any]] = self.optimizer.state if self.optimizer is not None else {}
        for name, parameter in self.states.items():
            for key, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    if name in by_name:
                        changes.append((state[parameter], key, cut_tensor(value, by_name[name])))
                elif not (isinstance(value, int | float | None) or (isinstance(value, Tensor) and value.numel() == 1)):
                    raise UnsupportedLayerError(
                        f"{type(self.optimizer).__name__} keeps {key!r} for {name}, which has not its shape: "
                        "it can't be cut; make the optimizer after pruning"
                    )
        return changes

    def _attributes(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        changes = []
        names = {id(state): name for name, state in self.states.items()}
        for module in model.modules():
            local = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            tensors = {n: self.tensors.get(names.get(id(t), ""), t) for n, t in local}
            if any(tensors[n] is not t for n, t in local):
                values = new_attributes(module, tensors)
                changes += [(module, key, value) for key, value in values.items() if getattr(module, key) != value]
        return changes

    def commit(self) -> None:
        """Put the new tensors and attributes in."""
        for name, tensor in self.tensors.items():
            state = self.states[name]
            old, grad = state.data, state.grad
            self.undo_steps.append(functools.partial(_replace, state, old, grad))
            _replace(state, tensor, None)
        for module, key, value in self.attributes:
            self.undo_steps.append(functools.partial(setattr, module, key, getattr(module, key)))
            setattr(module, key, value)
        for layer in self.recurrent:
            # On a GPU its weights must lie in one piece of memory.
            layer.flatten_parameters()
        for kept, key, tensor in self.optimizer_tensors:
            self.undo_steps.append(functools.partial(kept.__setitem__, key, kept[key]))
            kept[key] = tensor

    def undo(self) -> None:
        """Everything as it was before ``commit``."""
        while self.undo_steps:
            self.undo_steps.pop()()


def _user_attributes(model: nn.Module, new_sizes: Sequence[NewAttribute]) -> list[tuple[nn.Module, str, Any]]:
    """Sizes that the user's modules keep for themselves, as whole attributes."""
    values: dict[tuple[str, str], Any] = {}
    modules = {
        name.removeprefix("module.").removeprefix("_orig_mod."): module for name, module in model.named_modules()
    }
    for new in new_sizes:
        attribute = new.attribute
        key = attribute.module, attribute.name
        old = values.get(key, getattr(modules.get(attribute.module), attribute.name, None))
        found = old if attribute.item is None else old[attribute.item] if isinstance(old, tuple | list) else None
        if found != new.before:
            raise PlanError(
                f"the plan does not fit this model: {attribute} is {found}, the plan was made for {new.before}"
            )
        if attribute.item is None:
            values[key] = new.after
        else:
            assert isinstance(old, tuple | list)
            values[key] = type(old)([*old[: attribute.item], new.after, *old[attribute.item + 1 :]])
    return [(modules[module], name, value) for (module, name), value in values.items()]


def _cut_sizes(model: nn.Module, cuts: Mapping[str, list[Cut]]) -> list[tuple[nn.Module, str, Any]]:
    """New sizes of norms that have no parameters to cut."""
    norms = {name: (module, attribute) for name, module, attribute in find_unweighted_norms(model)}
    changes = []
    for name, mine in cuts.items():
        module, attribute = norms[name]
        kept = {cut.dim: len(cut.keep) for cut in mine}
        changes.append((module, attribute, new_size(getattr(module, attribute), kept)))
    return changes


def _replace(state: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give a parameter other data; the detour over another dtype drops what autograd cached about its shape."""
    state.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    state.data = torch.empty(0, dtype=other, device=data.device)
    state.data = data
    state.grad = grad
