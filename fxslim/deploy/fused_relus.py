# SPDX-License-Identifier: Apache-2.0
"""Which ReLUs become part of the layers before them: where nothing else reads what they clamp."""

from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

from fxslim.graph.recording import ModuleCall
from fxslim.quantization.dataflow import Dataflow, operator_of, readers_of


def find_relus(
    model: nn.Module, layers: Iterable[str], norms: Mapping[str, str], flows: Sequence[Dataflow]
) -> tuple[set[str], tuple[str, ...]]:
    """The layers whose results only ReLUs read, and the modules that clamp nothing besides those.

    ``norms``: those that become part of the layers.
    """
    ends = {norms.get(name, name): name for name in layers}
    seen: dict[str, list[bool]] = {}
    for flow in flows:
        for call in flow.recording.calls:
            if call.name in ends:
                seen.setdefault(ends[call.name], []).append(_ends_in_relu(flow, call))
    fused = {name for name, fits in seen.items() if all(fits)}
    return fused, _idle_modules(model, {end for end, name in ends.items() if name in fused}, flows)


def _ends_in_relu(flow: Dataflow, call: ModuleCall) -> bool:
    if len(call.outputs) != 1 or call.outputs[0] in flow.recording.outputs:
        return False
    node = call.outputs[0]
    readers = readers_of(node)
    return _is_own(flow, node) and bool(readers) and all(_is_relu_of(reader, node) for reader in readers)


def _is_own(flow: Dataflow, node: fx.Node) -> bool:
    """Whether a layer's or a norm's arithmetic gave it, and not a hook's."""
    made = node.args[0] if operator_of(node) == "getitem" else node
    return flow.is_product(node) or (isinstance(made, fx.Node) and flow.is_norm(made))


def _is_relu_of(reader: fx.Node, node: fx.Node) -> bool:
    return operator_of(reader) == "relu" and reader.args[0] is node


def _idle_modules(model: nn.Module, ends: set[str], flows: Sequence[Dataflow]) -> tuple[str, ...]:
    """Modules that are called on nothing but results that are clamped already."""
    idle: dict[str, bool] = {}
    for flow in flows:
        clamped = {call.outputs[0] for call in flow.recording.calls if call.name in ends}
        for call in flow.recording.calls:
            if type(model.get_submodule(call.name)) is nn.ReLU:
                idle[call.name] = idle.get(call.name, True) and _is_idle(call, clamped)
    return tuple(name for name, yes in idle.items() if yes)


def _is_idle(call: ModuleCall, clamped: set[fx.Node]) -> bool:
    """A second reader could be given what this one changes, were there no copy."""
    if len(call.inputs) != 1 or call.inputs[0] not in clamped:
        return False
    readers = readers_of(call.inputs[0])
    return len(readers) == 1 and _is_relu_of(readers[0], call.inputs[0]) and readers[0].meta.get("module") == call.name
