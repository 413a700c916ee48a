# SPDX-License-Identifier: Apache-2.0
"""``trace``: which channels of a model belong together, what is frozen and why, what everything costs."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fxslim.graph.rules as _registered  # noqa: F401
from fxslim.errors import ConfigError, TraceError, unknown_name
from fxslim.graph.conflicts import Conflict, Decisions
from fxslim.graph.cost import Cost
from fxslim.graph.freeze_report import tell_freezes
from fxslim.graph.groups import ChannelGroup, ResolvedLabels
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.recording import Recording, record
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.settling import Arranger, settle
from fxslim.graph.slots import owner


@dataclass(frozen=True, kw_only=True)
class ChannelGraph:
    """Groups of channels, frozen layers with their reasons, and the cost of each layer."""

    groups: list[ChannelGroup]
    cost: Cost
    arranger: Arranger
    state_shapes: dict[str, tuple[int, ...]]
    not_reached: list[str]
    notes: tuple[str, ...] = ()

    @property
    def resolved(self) -> ResolvedLabels:
        return self.arranger.resolved

    def without(self, model: nn.Module, conflict: Conflict) -> "ChannelGraph":
        """The graph that gives up what a conflict asks for."""
        decisions = self.arranger.propagation.decisions.after(conflict)
        return _graph_of(model, settle(model, self.arranger.recordings, decisions), self.notes)

    def _check_layer(self, layer: str) -> None:
        known = sorted({owner(name) for name in self.state_shapes})
        if layer not in known:
            raise ConfigError(unknown_name("layer", layer, known))

    def parents(self, layer: str) -> list[str]:
        """Layers that make the channels which this layer reads."""
        self._check_layer(layer)
        found = [p for g in self.groups if layer in g.layers("consumer") for p in g.layers("producer")]
        return list(dict.fromkeys(found))

    def children(self, layer: str) -> list[str]:
        """Layers that read the channels which this layer makes."""
        self._check_layer(layer)
        found = [c for g in self.groups if layer in g.layers("producer") for c in g.layers("consumer")]
        return list(dict.fromkeys(found))

    def explain(self, layer: str) -> str:
        """Why the output channels of a layer can be removed, or why not."""
        self._check_layer(layer)
        lines = [str(group) for group in self.groups if layer in group.layers("producer", "depthwise")]
        for slot in self.resolved.slots:
            if owner(slot.name) == layer and slot.role == "producer":
                reasons = Counter(
                    self.resolved.reason(c) for c in self.resolved.of(slot).tolist() if self.resolved.frozen[c]
                )
                lines += [f"{layer}: {count} of {len(slot.ids)} channels stay: {why}" for why, count in reasons.items()]
        lines += list(dict.fromkeys(f"{layer}: stays: {why}" for why in self._reasons_for(layer)))
        if any(owner(name) == layer for name in self.not_reached):
            lines.append(f"{layer}: stays: not reached by the example inputs")
        return "\n".join(lines) or f"{layer}: makes no channels of its own"

    def _reasons_for(self, layer: str) -> list[str]:
        """Why states of a layer stay whole that are no one's channels."""
        return [why for name, why in self.resolved.whole.items() if owner(name) == layer]

    def frozen_layers(self) -> dict[str, str]:
        """Layers that make channels of which none is free, with the reason."""
        frozen = {}
        for slot in self.resolved.slots:
            classes = self.resolved.of(slot)
            if slot.role == "producer" and self.resolved.frozen[classes].all():
                frozen[owner(slot.name)] = self.resolved.reason(int(classes[0]))
        for name, why in self.resolved.whole.items():
            if len(self.state_shapes[name]) > 1:
                frozen.setdefault(owner(name) or name, why)
        return frozen

    def report(self) -> str:
        """The groups; what is frozen, why, how much of the macs that is, and what would lift it."""
        lines = [f"{self.cost}", f"{len(self.groups)} groups, {sum(map(len, self.groups))} removable channels", ""]
        lines += [f"  {group}" for group in self.groups]
        frozen = self.frozen_layers()
        lines += ["", f"{len(frozen)} layers keep all their channels"] if frozen else []
        lines += tell_freezes(frozen, self.cost.layers)
        lines += [f"  {name}: not reached by the example inputs" for name in self.not_reached]
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.report()

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{g.name}</td><td>{len(g)}</td><td>{', '.join(g.layers())}</td></tr>" for g in self.groups
        )
        return f"<table><tr><th>group</th><th>channels</th><th>layers</th></tr>{rows}</table>"


def trace(model: nn.Module, inputs: Any, *, heads: str = "whole", train_inputs: Any = None) -> ChannelGraph:
    """Record the model on example inputs and find its groups of channels.

    ``heads``: attention loses whole heads, or ("dim") equally many entries of each head.
    ``train_inputs`` are example inputs of its train mode, where that needs others (a detector's targets).

    >>> from torch import nn, randn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> print(trace(net, randn(1, 3, 8, 8)).groups[0])
    0: 8 channels | makes 0.weight[0] | reads 2.weight[1] | with 0.bias[0]
    """
    if heads not in ("whole", "dim"):
        raise ConfigError(f"heads={heads!r} must be 'whole' (heads go) or 'dim' (each head gets narrower)")
    refuse_wrapped(model)
    model = without_compile_wrapper(model)
    examples = as_inputs(inputs)
    # Under inference_mode nothing would be recorded.
    with torch.inference_mode(False):
        recordings = [record(model, example) for example in examples]
        if train_inputs is None:
            notes = _record_training(model, recordings, examples[0])
        else:
            recordings += [record(model, example, training=True) for example in as_inputs(train_inputs)]
            notes = []
    return _graph_of(model, settle(model, recordings, Decisions(heads=heads)), tuple(notes))


def _graph_of(model: nn.Module, arranger: Arranger, notes: tuple[str, ...]) -> ChannelGraph:
    propagation = arranger.propagation
    shapes = {name: tuple(state.shape) for name, state in propagation.states.items()}
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    return ChannelGraph(
        groups=arranger.resolved.groups(),
        cost=Cost(
            calls=arranger.calls,
            state_shapes=shapes,
            element_sizes={name: state.element_size() for name, state in propagation.states.items()},
            parameter_names=frozenset(name for name, _ in model.named_parameters()),
        ),
        arranger=arranger,
        state_shapes=shapes,
        notes=notes,
        not_reached=[name for name in weights if name not in propagation.reached],
    )


def _record_training(model: nn.Module, recordings: list[Recording], example: Inputs) -> list[str]:
    """Where the eval forward left parameters out, they may be on a path of training only (auxiliary heads)."""
    reached = {
        node.target for recording in recordings for node in recording.nodes if node.op == "get_attr" and node.users
    }
    all_reached = all(name in reached for name, _ in model.named_parameters())
    if all_reached and not _asks_for_training(model):
        return []

    def at_least_two(value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value

    doubled = Inputs(*tree_map(at_least_two, example.args), **tree_map(at_least_two, example.kwargs))
    try:
        recordings.append(record(model, doubled, training=True))
    except TraceError as error:
        return [
            f"the training forward could not be recorded: {error}; if train mode needs other inputs, such as targets, "
            "give an example of them: train_inputs="
        ]
    return []


def _asks_for_training(model: nn.Module) -> bool:
    """Whether a module that is not torch's own looks at ``self.training``, other than to drop what it is given."""
    kinds = {
        type(module)
        for module in model.modules()
        if not type(module).__module__.startswith("torch.") and (module._modules or module._parameters)
    }
    functions = [f for kind in kinds for f in vars(kind).values() if hasattr(f, "__code__")]
    return any("training" in function.__code__.co_names for function in functions)
