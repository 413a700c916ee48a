# SPDX-License-Identifier: Apache-2.0
"""Removed channels as zeros in the full-size model: the entries, and norms that leave them out."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fxslim.graph.recording import named_states
from fxslim.graph.surgery.cutting import Cut
from fxslim.graph.unweighted_norms import find_unweighted_norms
from fxslim.graph.weight_norms import find_weight_norms, make_plain
from fxslim.graph.written_norms import AVERAGES, channel_vectors
from fxslim.pruning.removals import kept_norms, silent_entries


def silence(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Set every entry that the cuts remove to 0."""
    states, norms = dict(named_states(model)), find_weight_norms(model)
    silent = silent_entries(cuts, states, norms)
    with torch.no_grad():
        for name, value in kept_norms(norms, states, silent, {}).items():
            states[name].copy_(value)
        for name, entries in silent.items():
            for gone in entries:
                states[name].masked_fill_(gone.to(states[name].device), 0)


def with_plain_weights(model: nn.Module, cuts: Iterable[Cut]) -> list[Cut]:
    """Make parameters of weights under weight norm that are cut, in place. The cuts, as those of the weights."""
    cuts = list(cuts)
    cut_names = {cut.name for cut in cuts}
    for norm in find_weight_norms(model):
        if norm.direction not in cut_names:
            continue
        make_plain(model.get_submodule(norm.layer))
        weight = f"{norm.layer}.{norm.weight}".lstrip(".")
        mine = [dataclasses.replace(cut, name=weight) for cut in cuts if cut.name == norm.direction]
        cuts = [cut for cut in cuts if cut.name not in (norm.gain, norm.direction)] + mine
    return cuts


class NormsOverKept(TorchFunctionMode):
    """Norms whose weight is cut average over the kept channels only, as they will in the pruned model.

    A norm without a weight is known by its module, which hooks tell while the mode is on; so is one that a user
    wrote: where a module that has vectors only, which are cut, averages over a dim as long as they are.
    """

    FUNCTIONS = ("layer_norm", "rms_norm", "group_norm")

    def __init__(self, model: nn.Module, cuts: Iterable[Cut]) -> None:
        super().__init__()
        cuts = list(cuts)
        known: dict[str, object] = dict(named_states(model))
        known |= {name: module for name, module, size in find_unweighted_norms(model) if size != "num_features"}
        # In the order of the full-size model, so that each group of a group norm is still made of its own channels.
        self.kept = {
            id(known[cut.name]): (cut.dim, torch.tensor(sorted(cut.keep))) for cut in cuts if cut.name in known
        }
        self.modules = [m for m in known.values() if isinstance(m, nn.Module) and id(m) in self.kept]
        self.averaging = dict(_averaging(model, cuts))
        self.modules += [m for m in model.modules() if id(m) in self.averaging]
        self.inside: list[nn.Module] = []
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        def leave(*_: Any) -> None:
            self.inside.pop()

        for module in self.modules:
            self.handles.append(module.register_forward_pre_hook(lambda m, _: self.inside.append(m)))
            self.handles.append(module.register_forward_hook(leave, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self.handles:
            self.handles.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in AVERAGES and self.inside:
            return func(self._kept_of(name, args, kwargs), *args[1:], **kwargs)
        if name not in self.FUNCTIONS:
            return func(*args, **kwargs)
        x, groups_or_shape = args[0], args[1]
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        found = self.kept.get(id(self.inside[-1] if weight is None and self.inside else weight))
        if found is None:
            return func(*args, **kwargs)
        in_weight, index = found[0], found[1].to(x.device)
        rank = 1 if name == "group_norm" else len(groups_or_shape)
        dim = 1 if name == "group_norm" else x.dim() - rank + in_weight
        part = x.index_select(dim, index)
        second = groups_or_shape if name == "group_norm" else part.shape[x.dim() - rank :]

        def cut(value: Any) -> Any:
            return value.index_select(in_weight, index) if isinstance(value, Tensor) else value

        rest, named = [cut(value) for value in args[2:]], {key: cut(value) for key, value in kwargs.items()}
        return torch.zeros_like(x).index_copy(dim, index, func(part, second, *rest, **named))

    def _kept_of(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a mean is taken of: the kept entries only, where it runs over the channels of a norm."""
        size, index = self.averaging.get(id(self.inside[-1]), (0, torch.empty(0)))
        x, place = args[0], 2 if "norm" in name else 1
        given = kwargs.get("dim", kwargs.get("axis", args[place] if len(args) > place else None))
        if given is None or isinstance(given, bool):
            given = range(x.dim())
        dims = {d % x.dim() for d in (given if isinstance(given, Iterable) else [given])}
        over = [d for d in dims if x.shape[d] == size]
        return x.index_select(over[0], index.to(x.device)) if len(over) == 1 else x


def _averaging(model: nn.Module, cuts: Iterable[Cut]) -> Iterator[tuple[int, tuple[int, Tensor]]]:
    """Modules whose vectors are cut, all alike: the length of the vectors, and what stays of them."""
    keep = {cut.name: cut.keep for cut in cuts}
    for name, module in model.named_modules():
        vectors = [(f"{name}.{own}".lstrip("."), size) for own, _, size in channel_vectors(module)]
        kept = {(size, keep[vector]) for vector, size in vectors if vector in keep}
        if len(kept) == 1:
            ((size, entries),) = kept
            yield id(module), (size, torch.tensor(entries))
