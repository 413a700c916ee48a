# SPDX-License-Identifier: Apache-2.0
"""Removed channels as zeros in the full-size model: which entries they are, and norms that leave them out."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxslim.graph.recording import named_states
from fxslim.graph.surgery.cutting import Cut


def removed_entries(cut: Cut, shape: tuple[int, ...]) -> Tensor:
    """True where a tensor of this shape loses entries; of its rank, so that it broadcasts to it.

    >>> removed_entries(Cut(name="conv.weight", dim=0, keep=(0, 2)), (3, 1)).flatten()
    tensor([False,  True, False])
    """
    gone = torch.ones(cut.blocks * shape[cut.dim], dtype=torch.bool)
    gone[list(cut.keep)] = False
    if cut.blocks > 1:
        # Each block of output channels reads inputs of its own.
        gone = gone.view(cut.blocks, shape[1]).repeat_interleave(shape[0] // cut.blocks, 0)
        return gone.view(shape[0], shape[1], *[1] * (len(shape) - 2))
    return gone.view([-1 if d == cut.dim else 1 for d in range(len(shape))])


def silence(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Set every entry that the cuts remove to 0."""
    states = dict(named_states(model))
    with torch.no_grad():
        for cut in cuts:
            state = states[cut.name]
            state.masked_fill_(removed_entries(cut, tuple(state.shape)).to(state.device), 0)


class NormsOverKept(TorchFunctionMode):
    """Norms whose weight is cut average over the kept channels only, as they will in the pruned model."""

    FUNCTIONS: ClassVar[dict[str, int]] = {"layer_norm": -1, "rms_norm": -1, "group_norm": 1}

    def __init__(self, model: nn.Module, cuts: Iterable[Cut]) -> None:
        super().__init__()
        states = dict(named_states(model))
        self.kept = {id(states[cut.name]): torch.tensor(cut.keep) for cut in cuts if states[cut.name].dim() == 1}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if name not in self.FUNCTIONS or id(weight) not in self.kept:
            return func(*args, **kwargs)
        x, groups_or_shape = args[0], args[1]
        index = self.kept[id(weight)].to(x.device)
        dim = self.FUNCTIONS[name] % x.dim()
        second = groups_or_shape if name == "group_norm" else [len(index)]
        rest = [p[index] if isinstance(p, Tensor) else p for p in args[2:]]
        cut_kwargs = {k: p[index] if isinstance(p, Tensor) else p for k, p in kwargs.items()}
        part = func(x.index_select(dim, index), second, *rest, **cut_kwargs)
        return torch.zeros_like(x).index_copy(dim, index, part)
