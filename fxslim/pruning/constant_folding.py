# SPDX-License-Identifier: Apache-2.0
"""Channels whose weights are all masked still give a constant; it moves into what the next layer adds anyway.

A masked convolution with a bias (or a batch norm after it) gives the same number at every pixel. The layer that
reads it adds weight times number to each of its outputs. That sum goes into its bias, or comes off the running
mean of the batch norm that follows. Exact in eval mode, and only where the number reaches the layer unchanged
everywhere: zero padding puts other numbers at the border.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fxslim.errors import PlanError
from fxslim.graph.inputs import Inputs
from fxslim.graph.propagation import operator_name
from fxslim.graph.recording import Recording, named_states, undisturbed
from fxslim.graph.slots import entry_sums
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.double_precision import double_copy
from fxslim.pruning.removals import removed_entries
from fxslim.pruning.silencing import silence

# How far a constant may be from constant, in float64: upsampling rounds.
SPREAD = 1e-11
_TRANSPOSITIONS = ("t", "transpose", "permute")
_BATCH_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_no_update",
)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The constants that a layer with this weight reads go into this bias or running mean."""

    weight: str
    into: str


@dataclass(kw_only=True)
class Consumed:
    """What a layer read in all its calls: the smallest and the largest value of each input channel."""

    low: Tensor
    high: Tensor
    # Zeros are put around or between the pixels.
    padded: bool

    @property
    def constant(self) -> Tensor:
        """Channels with one value everywhere."""
        return (self.high - self.low) <= SPREAD * self.high.abs().clamp(min=1.0)

    @classmethod
    def never(cls, size: int) -> "Consumed":
        """Of a layer that was not called: nothing is known, so nothing is constant."""
        unknown = torch.full((size,), torch.nan, dtype=torch.float64)
        return cls(low=unknown, high=unknown, padded=False)

    @property
    def zero(self) -> Tensor:
        return (self.low == 0) & (self.high == 0)


class _Reader(TorchDispatchMode):
    """Notes what convolutions and matrix products read, by the name of their weight."""

    def __init__(self, model: nn.Module, consumed: dict[str, Consumed]) -> None:
        super().__init__()
        self.names = {id(state): name for name, state in named_states(model)}
        self.transposed: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.consumed = consumed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = func.__name__.split(".")[0]
        if kind == "convolution" and id(args[1]) in self.names:
            x, weight = args[0], args[1]
            by_channel = x.movedim(1 if x.dim() == weight.dim() else 0, 0)
            self._note(self.names[id(weight)], by_channel, padded=any(args[4]) or bool(args[6]))
        elif kind in _TRANSPOSITIONS and id(args[0]) in self.names:
            self.transposed[result] = self.names[id(args[0])]
        elif kind in ("mm", "addmm"):
            x, weight = args[-2:]
            name = self.transposed.get(weight) or self.names.get(id(weight))
            if name is not None:
                self._note(name, x.movedim(-1, 0), padded=False)
        return result

    def _note(self, name: str, by_channel: Tensor, padded: bool) -> None:
        if not by_channel.numel():
            return
        values = by_channel.flatten(1).double()
        low, high = values.amin(1), values.amax(1)
        before = self.consumed.get(name)
        if before is not None:
            low, high, padded = low.minimum(before.low), high.maximum(before.high), padded or before.padded
        self.consumed[name] = Consumed(low=low, high=high, padded=padded)


def consumed_values(model: nn.Module, examples: Iterable[Inputs]) -> dict[str, Consumed]:
    """What each layer reads in eval mode on these inputs, by the name of its weight."""
    consumed: dict[str, Consumed] = {}
    with undisturbed(model, training=False), torch.no_grad():
        for example in examples:
            with _Reader(model, consumed):
                example.copied().run(model)
    return consumed


def fold_targets(recordings: Iterable[Recording]) -> dict[str, str]:
    """For each weight the bias or running mean that can take its constants; absent where none can.

    The bias must belong to that weight alone; without one, a batch norm must be the only reader of the result.
    """
    found: dict[str, set[str | None]] = {}
    owners: dict[str, set[str | None]] = {}
    for recording in recordings:
        for node in recording.nodes:
            weight = _weight(node)
            if weight is not None:
                found.setdefault(weight, set()).add(_target(node, recording.outputs))
            elif operator_name(node) in _BATCH_NORMS:
                weight = _weight(node.args[0])
            for argument in node.all_input_nodes:
                if argument.op == "get_attr":
                    owners.setdefault(str(argument.target), set()).add(weight)
    targets = {}
    for weight, choices in found.items():
        target = choices.pop()
        if not choices and target is not None and owners[target] == {weight}:
            targets[weight] = target
    return targets


def _weight(node: Any) -> str | None:
    """The parameter that a convolution or matrix product multiplies with."""
    name = operator_name(node) if isinstance(node, fx.Node) and node.op == "call_function" else ""
    places = {"convolution": 1, "addmm": 2, "mm": 1}
    return _state(node.args[places[name]]) if name in places else None


def _state(value: Any) -> str | None:
    """The name of a parameter or buffer, seen through transposition."""
    while isinstance(value, fx.Node) and value.op == "call_function" and operator_name(value) in _TRANSPOSITIONS:
        value = value.args[0]
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _target(node: fx.Node, outputs: list[fx.Node]) -> str | None:
    place = {"convolution": 2, "addmm": 0}.get(operator_name(node))
    if place is not None and node.args[place] is not None:
        # With factors of its own, a sum is more than product plus bias.
        return None if node.kwargs else _state(node.args[place])
    readers = list(node.users)
    if len(readers) != 1 or node in outputs or operator_name(readers[0]) not in _BATCH_NORMS:
        return None
    return _state(readers[0].args[3]) if readers[0].args[0] is node else None


def silenced_twin(model: nn.Module, zeros: Iterable[Cut]) -> nn.Module:
    """A copy in float64, free of masks, with these entries at 0."""
    twin = double_copy(model)
    silence(twin, zeros)
    return twin


def folded_values(
    model: nn.Module, cuts: Sequence[Cut], zeros: Sequence[Cut], folds: Sequence[Fold], inputs: Sequence[Inputs]
) -> dict[str, Tensor]:
    """New full-size values of biases and running means in float64, from the weights that the model has now."""
    twin = silenced_twin(model, zeros)
    states = dict(named_states(twin))
    consumed = consumed_values(twin, [example.in_double() for example in inputs])
    targets = {fold.weight: fold.into for fold in folds}
    values: dict[str, Tensor] = {}
    for cut in cuts:
        if cut.role != "consumer":
            continue
        weight = states[cut.name].detach()
        read = consumed.get(cut.name, Consumed.never(cut.blocks * weight.shape[cut.dim]))
        added = _added_constant(weight, cut, read, targets.get(cut.name))
        if added is not None:
            into = targets[cut.name]
            sign = -1 if into.rpartition(".")[2] == "running_mean" else 1
            values[into] = values.get(into, states[into].detach()) + sign * added
    return values


def _added_constant(weight: Tensor, cut: Cut, consumed: Consumed, into: str | None) -> Tensor | None:
    """What the removed input channels add to each output; None where it is nothing."""
    gone = removed_entries(cut, tuple(weight.shape)).to(weight.device)
    read = entry_sums(torch.where(gone, weight, 0.0).abs(), cut).to(consumed.low.device)
    wrong = (read != 0) & ~consumed.constant
    if wrong.any():
        raise PlanError(
            f"{cut.name} reads {int(wrong.sum())} removed channels that are not constant in this model: it has other "
            "masks than the plan was made from, or example inputs on which it gives NaN; nothing was changed. "
            "Zero the weights where they are masked, or make the plan from this model's masks"
        )
    constants = torch.where(read != 0, (consumed.low + consumed.high) / 2, 0.0)
    if not constants.any():
        return None
    if into is None or consumed.padded:
        raise PlanError(
            f"{cut.name} reads {int(constants.ne(0).sum())} removed channels that are constant but not 0, up to "
            f"{float(constants.abs().max()):.3g}, and they can't be folded into what follows: the plan was made when "
            "they were 0. Nothing was changed; make the plan from this model"
        )
    taps = weight.transpose(0, 1) if cut.dim == 0 else weight
    taps = taps.reshape(*taps.shape[:2], -1).sum(-1)
    constants = constants.to(weight.device)
    return (taps.reshape(cut.blocks, -1, taps.shape[1]) * constants.view(cut.blocks, 1, -1)).sum(-1).flatten()
