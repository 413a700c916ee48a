# SPDX-License-Identifier: Apache-2.0
"""Cuts parameters and buffers of a model, all or none.

``nn.Parameter`` objects stay the same objects, so optimizers and user code that hold them stay right; the
state that an optimizer keeps for them is cut alike, and so are gradients: accumulating them can go on. A graph
that was recorded before the cut and is still alive can't be walked backward any more, new ones can.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxslim.errors import ConfigError, PlanError, UnsupportedLayerError
from fxslim.graph.recording import named_states
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.attributes import new_attributes, new_size
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.old_graphs import OldGraphs
from fxslim.graph.unweighted_norms import find_unweighted_norms

# Elements that are cut at a time.
_PIECE = 1 << 20


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
    for cut in (cut for cut in cuts if cut.blocks > 1):
        result = _cut_blocks(result, cut, _index(cut, tensor))
    plain = {cut.dim: _index(cut, tensor) for cut in cuts if cut.blocks == 1}
    if 0 in plain and len(plain) > 1 and tensor.layout == torch.strided:
        result = _cut_rows(result, plain.pop(0), plain)
    else:
        for dim, index in plain.items():
            result = result.index_select(dim, index)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous() if result.layout == torch.strided else result


def _index(cut: Cut, tensor: Tensor) -> Tensor:
    # By way of numpy, which reads long tuples faster.
    return torch.from_numpy(np.array(cut.keep, dtype=np.int64)).to(tensor.device)


def _cut_rows(tensor: Tensor, rows: Tensor, others: dict[int, Tensor]) -> Tensor:
    """Cuts along the first dim and others, some rows at a time: all rows cut along one dim would take more memory."""
    sizes = [len(rows), *(len(others[d]) if d in others else tensor.shape[d] for d in range(1, tensor.dim()))]
    result = tensor.new_empty(sizes)
    step = max(1, _PIECE // max(1, tensor[:1].numel()))
    for start in range(0, len(rows), step):
        piece = tensor.index_select(0, rows[start : start + step])
        for dim, index in others.items():
            piece = piece.index_select(dim, index)
        result[start : start + step] = piece
    return result


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
    """New tensors and attributes, computed first; ``commit`` puts them in.

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
        self.states = dict(named_states(model))
        by_name: dict[str, list[Cut]] = {}
        for cut in cuts:
            by_name.setdefault(cut.name, []).append(cut)
        sizes = {name: by_name.pop(name) for name in list(by_name) if name not in self.states}
        given = {name: value.to(self.states[name].dtype) for name, value in (values or {}).items()}
        full = self.states | given
        self.optimizer_tensors = _cut_optimizer(optimizer, self.states, by_name) if optimizer is not None else []
        self.tensors = {name: cut_tensor(full[name], by_name.get(name, [])) for name in by_name | given}
        grads = {name: grad for name in self.tensors if (grad := self.states[name].grad) is not None}
        self.grads = {name: cut_tensor(grad, by_name.get(name, [])) for name, grad in grads.items()}
        self.attributes = [*self._attributes(model), *_cut_sizes(model, sizes), *_user_attributes(model, new_sizes)]
        self.recurrent = {module for module, _, _ in self.attributes if isinstance(module, nn.RNNBase)}
        self.old_graphs = OldGraphs({name: self.states[name] for name in self.tensors})

    def _attributes(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        new = {id(self.states[name]): tensor for name, tensor in self.tensors.items()}
        changes = []
        for module in model.modules():
            local = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            if any(id(state) in new for _, state in local):
                values = new_attributes(module, {name: new.get(id(state), state) for name, state in local})
                changes += [(module, key, value) for key, value in values.items() if getattr(module, key) != value]
        return changes

    def commit(self, changes: Changes) -> None:
        """Put the new tensors and attributes in."""
        for name, tensor in self.tensors.items():
            changes.replace_data(self.states[name], tensor, self.grads.get(name))
        for module, key, value in self.attributes:
            changes.set_attribute(module, key, value)
        for layer in self.recurrent:
            # On a GPU its weights must lie in one piece of memory; the parameters bring their old pieces back.
            changes.make(layer.flatten_parameters, _nothing)
        for kept, key, tensor in self.optimizer_tensors:
            changes.set_item(kept, key, tensor)

    def close_old_graphs(self, changes: Changes) -> None:
        """The last change: losses from before can't be walked backward any more."""
        self.old_graphs.close(changes)


def _cut_optimizer(
    optimizer: Optimizer, states: dict[str, Tensor], by_name: dict[str, list[Cut]]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """What an optimizer keeps for each parameter, cut like the parameter."""
    kind = type(optimizer).__name__
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, states.values())):
        raise ConfigError(
            f"optimizer: this {kind} holds {len(held)} parameters and none of this model's: "
            f"make it from the parameters of the model that is pruned"
        )
    found = []
    state: Mapping[Tensor, dict[str, Any]] = optimizer.state
    for name, parameter in states.items():
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                if name in by_name:
                    found.append((state[parameter], key, cut_tensor(value, by_name[name])))
            elif not (isinstance(value, int | float | None) or (isinstance(value, Tensor) and value.numel() == 1)):
                raise UnsupportedLayerError(
                    f"{kind} keeps {key!r} for {name}, which has not its shape: "
                    "it can't be cut; make the optimizer after pruning"
                )
    return found


def _user_attributes(model: nn.Module, new_sizes: Sequence[NewAttribute]) -> list[tuple[nn.Module, str, Any]]:
    """Sizes that the user's modules keep for themselves, as whole attributes."""
    values: dict[tuple[nn.Module, str], Any] = {}
    modules = dict(model.named_modules())
    inside = {_without_wrapper(name): module for name, module in modules.items()}
    for new in new_sizes:
        name, item = new.attribute.name, new.attribute.item
        near = (modules.get(new.attribute.module), inside.get(_without_wrapper(new.attribute.module)))
        owners = [owner for owner in near if owner is not None]
        found = [values.get((owner, name), getattr(owner, name, None)) for owner in owners]
        sizes = [_size_in(value, item) for value in found]
        if new.before not in sizes:
            raise PlanError(
                f"the plan does not fit this model: {new.attribute} is {sizes[0] if sizes else None}, "
                f"the plan was made for {new.before}"
            )
        owner, old = owners[sizes.index(new.before)], found[sizes.index(new.before)]
        after: Any = new.after
        if item is not None:
            assert isinstance(old, tuple | list)
            after = type(old)([*old[:item], after, *old[item + 1 :]])
        values[owner, name] = after
    return [(module, name, value) for (module, name), value in values.items()]


def _without_wrapper(name: str) -> str:
    return (name + ".").removeprefix("module.").removeprefix("_orig_mod.")[:-1]


def _size_in(value: Any, item: int | None) -> Any:
    if item is None:
        return value
    return value[item] if isinstance(value, tuple | list) and item < len(value) else None


def _cut_sizes(model: nn.Module, cuts: Mapping[str, list[Cut]]) -> list[tuple[nn.Module, str, Any]]:
    """New sizes of norms that have no parameters to cut."""
    norms = {name: (module, attribute) for name, module, attribute in find_unweighted_norms(model)}
    changes = []
    for name, mine in cuts.items():
        module, attribute = norms[name]
        kept = {cut.dim: len(cut.keep) for cut in mine}
        changes.append((module, attribute, new_size(getattr(module, attribute), kept)))
    return changes


def _nothing() -> None:
    """There is nothing to take back."""
