# SPDX-License-Identifier: Apache-2.0
"""Cuts parameters and buffers of a model, all or none.

``nn.Parameter`` objects stay the same objects, so optimizers and user code that hold them stay right; the
state that an optimizer keeps for them is cut alike, and so are gradients: accumulating them can go on. A graph
that was recorded before the cut and is still alive can't be walked backward any more, new ones can.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
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
from fxslim.graph.surgery.changes import Changes, replace_data
from fxslim.graph.surgery.old_graphs import OldGraphs
from fxslim.graph.surgery.user_attributes import changed_attributes
from fxslim.graph.unweighted_norms import find_unweighted_norms
from fxslim.graph.weight_norms import hooked_weights, layer_states

# Elements that are cut at a time.
_PIECE = 1 << 20
# Smaller parameters are kept as they were until a plan is applied, and so is one that is most of the model.
_LARGE = 1 << 14


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


@dataclass(frozen=True, kw_only=True)
class _Selection:
    """Entries of one dim, as ``Cut`` names them."""

    dim: int
    index: Tensor
    blocks: int


def cut_tensor(tensor: Tensor, cuts: Iterable[Cut]) -> Tensor:
    """A tensor with only the kept entries, in its memory format."""
    return _select(tensor, [_kept(cut, tensor.device) for cut in cuts])


def _kept(cut: Cut, device: torch.device) -> _Selection:
    return _Selection(dim=cut.dim, index=_index(cut.keep).to(device), blocks=cut.blocks)


# A norm and the layers around it keep the same entries, one after the other.
@functools.lru_cache(maxsize=16)
def _index(keep: tuple[int, ...]) -> Tensor:
    # By way of numpy, which reads long tuples faster.
    return torch.from_numpy(np.array(keep, dtype=np.int64))


def _select(tensor: Tensor, selections: Iterable[_Selection]) -> Tensor:
    result = tensor.detach()
    plain = {}
    for chosen in sorted(selections, key=lambda selection: selection.blocks == 1):
        if chosen.blocks > 1:
            result = _select_in_blocks(result, chosen)
        else:
            plain[chosen.dim] = chosen.index
    if 0 in plain and len(plain) > 1 and tensor.layout == torch.strided:
        result = _select_rows(result, plain.pop(0), plain)
    else:
        for dim, index in plain.items():
            result = result.index_select(dim, index)
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous() if result.layout == torch.strided else result


def _select_rows(tensor: Tensor, rows: Tensor, others: dict[int, Tensor]) -> Tensor:
    """Entries of the first dim and of others, some rows at a time: all rows cut along one dim take more memory."""
    sizes = [len(rows), *(len(others[d]) if d in others else tensor.shape[d] for d in range(1, tensor.dim()))]
    result = tensor.new_empty(sizes)
    step = max(1, _PIECE // max(1, tensor[:1].numel()))
    *first, last = others
    for start in range(0, len(rows), step):
        piece = tensor.index_select(0, rows[start : start + step])
        for dim in first:
            piece = piece.index_select(dim, others[dim])
        torch.index_select(piece, last, others[last], out=result[start : start + step])
    return result


def _select_in_blocks(tensor: Tensor, chosen: _Selection) -> Tensor:
    """Each block of output channels reads its own kept inputs: as many as the others, not the same."""
    width, each = tensor.shape[1], len(chosen.index) // chosen.blocks
    blocks = tensor.reshape(chosen.blocks, -1, *tensor.shape[1:])
    return torch.stack(
        [blocks[b].index_select(1, index - b * width) for b, index in enumerate(chosen.index.split(each))]
        if each
        else [block[:, :0] for block in blocks]
    ).flatten(0, 1)


def cut_shape(shape: Sequence[int], cuts: Iterable[Cut]) -> tuple[int, ...]:
    """The shape that ``cut_tensor`` gives.

    >>> cut_shape((8, 3), [Cut(name="fc.weight", dim=0, keep=(1, 5))])
    (2, 3)
    """
    sizes = list(shape)
    for cut in cuts:
        sizes[cut.dim], rest = divmod(len(cut.keep), cut.blocks)
        if rest:
            raise PlanError(f"{cut.name}: {len(cut.keep)} inputs can't be shared by {cut.blocks} groups")
    return tuple(sizes)


def _is_taken_apart(state: Tensor) -> bool:
    """Whether it is large, and no part of a still larger piece, as the weights of a recurrent layer are on a GPU."""
    if state.layout != torch.strided or state.is_meta or state.numel() < _LARGE:
        return False
    return state.untyped_storage().nbytes() == state.numel() * state.element_size()


class _Removal:
    """Entries taken out of a parameter, kept apart so that they can be put back: both take the memory of one."""

    def __init__(self, state: Tensor, cuts: Sequence[Cut]) -> None:
        self.state, self.cuts = state, sorted(cuts, key=lambda cut: cut.blocks == 1)
        self.shape, self.stride, self.grad = tuple(state.shape), state.stride(), state.grad
        self.kept: Tensor | None = None
        self.removed: list[Tensor] = []

    def make(self, grad: Tensor | None) -> None:
        """Take them out."""
        data = self.state.data
        before: list[_Selection] = []
        for cut in self.cuts:
            self.removed.append(_select(data, [*before, _others(cut, data)]))
            before.append(_kept(cut, data.device))
        self.kept = cut_tensor(data, self.cuts)
        del data
        replace_data(self.state, self.kept, grad)

    def restore(self) -> None:
        """Put them back, from any state in between."""
        if self.kept is None:
            return
        whole = self.kept
        for i in reversed(range(len(self.cuts))):
            shape = cut_shape(self.shape, self.cuts[:i])
            part, cut = whole, self.cuts[i]
            whole = part.new_empty(shape) if i else part.new_empty_strided(shape, self.stride)
            _put(whole, _kept(cut, whole.device), part)
            _put(whole, _others(cut, whole), self.removed[i])
        replace_data(self.state, whole, self.grad)


def _others(cut: Cut, tensor: Tensor) -> _Selection:
    """What ``_kept`` leaves of a tensor."""
    left = torch.ones(cut.blocks * tensor.shape[cut.dim], dtype=torch.bool)
    left[_index(cut.keep)] = False
    return _Selection(dim=cut.dim, index=left.nonzero().flatten().to(tensor.device), blocks=cut.blocks)


def _put(whole: Tensor, chosen: _Selection, part: Tensor) -> None:
    """The opposite of ``_select`` for one dim: its result goes where it came from."""
    if chosen.blocks == 1:
        whole.index_copy_(chosen.dim, chosen.index, part)
        return
    rows, each, width = len(whole) // chosen.blocks, len(chosen.index) // chosen.blocks, whole.shape[1]
    for b in range(chosen.blocks):
        inside = slice(b * rows, (b + 1) * rows)
        whole[inside].index_copy_(1, chosen.index[b * each : (b + 1) * each] - b * width, part[inside])


class Surgery:
    """What becomes of parameters and attributes; ``commit`` does it.

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
        self.optimizer_tensors = _cut_optimizer(optimizer, self.states, by_name) if optimizer is not None else []
        self.cuts = {name: by_name.get(name, []) for name in by_name | given}
        self.given = {name: cut_tensor(value, self.cuts[name]) for name, value in given.items()}
        grads = {name: grad for name in self.cuts if (grad := self.states[name].grad) is not None}
        self.grads = {name: cut_tensor(grad, self.cuts[name]) for name, grad in grads.items()}
        self.attributes = [*self._attributes(model), *_cut_sizes(model, sizes), *changed_attributes(model, new_sizes)]
        cut_ids = {id(self.states[name]) for name in self.cuts}
        self.hooked = [
            module
            for module in model.modules()
            if hooked_weights(module)
            and not cut_ids.isdisjoint(id(state) for _, state in layer_states(module).values())
        ]
        self.recurrent = {module for module, _, _ in self.attributes if isinstance(module, nn.RNNBase)}
        self.old_graphs = OldGraphs({name: self.states[name] for name in self.cuts})

    def _attributes(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        new = {
            id(self.states[name]): torch.empty(cut_shape(self.states[name].shape, cuts), device="meta")
            for name, cuts in self.cuts.items()
        }
        changes = []
        for module in model.modules():
            local = {name: state for name, (_, state) in layer_states(module).items()}
            if any(id(state) in new for state in local.values()):
                values = new_attributes(module, {name: new.get(id(state), state) for name, state in local.items()})
                changes += [(module, key, value) for key, value in values.items() if getattr(module, key) != value]
        return changes

    def commit(self, changes: Changes) -> None:
        """Put the new tensors and attributes in."""
        most = self._most_of_all()
        # Last: when the others are done, nothing else needs memory besides.
        for name in sorted(self.cuts, key=lambda name: name == most):
            state, grad, cuts = self.states[name], self.grads.get(name), self.cuts[name]
            if name in self.given or name == most or not _is_taken_apart(state):
                data = self.given[name] if name in self.given else cut_tensor(state, cuts)
                changes.replace_data(state, data, grad)
            else:
                cut = _Removal(state, cuts)
                changes.make(functools.partial(cut.make, grad), cut.restore)
        for module, key, value in self.attributes:
            changes.set_attribute(module, key, value)
        for module in self.hooked:
            for key, value in hooked_weights(module).items():
                changes.set_attribute(module, key, value)
        for layer in self.recurrent:
            # On a GPU its weights must lie in one piece of memory; the parameters bring their old pieces back.
            changes.make(layer.flatten_parameters, _nothing)
        for kept, key, tensor in self.optimizer_tensors:
            changes.set_item(kept, key, tensor)

    def _most_of_all(self) -> str:
        """The parameter that is more than half of the model, if one is.

        To take it apart it would be in memory twice for a moment; whole as it was and what stays of it is less.
        """
        sizes = {name: state.numel() * state.element_size() for name, state in self.states.items()}
        largest = max(sizes, key=sizes.__getitem__, default="")
        return largest if 2 * sizes.get(largest, 0) > sum(sizes.values()) else ""

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
