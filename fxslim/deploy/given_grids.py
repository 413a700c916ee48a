# SPDX-License-Identifier: Apache-2.0
"""Which quantizer elsewhere the input of a quantized layer comes from."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxslim.nn import HandedOverLinearQAT, QuantizedLayer
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.quantization.dataflow import Dataflow, operator_of


def find_given(model: nn.Module, layers: Mapping[str, QuantizedLayer], flows: Iterable[Dataflow]) -> dict[str, str]:
    """{layer: the quantizer elsewhere that its inputs come from}."""
    found: dict[str, set[str | None]] = {}
    for flow in flows:
        made = {}
        for call in flow.recording.calls:
            if call.outputs and isinstance(model.get_submodule(call.name), ActivationQuantizer):
                made[flow.source(call.outputs[0])] = call.name
        for call in flow.recording.calls:
            layer = layers.get(call.name)
            if layer is not None and layer.input_quantizer is None and not isinstance(layer, HandedOverLinearQAT):
                number = len(layer.input_names)
                sources = {_quantizer_of(flow, node, made) for node in call.inputs[:number]}
                found.setdefault(call.name, set()).update(sources or {None})
    single = {name: next(iter(sources)) for name, sources in found.items() if len(sources) == 1}
    return {name: source for name, source in single.items() if source is not None}


def _quantizer_of(flow: Dataflow, node: Any, made: Mapping[Any, str]) -> str | None:
    """The quantizer that a tensor comes from by moves and clamps at 0, which leave values on its grid."""
    while True:
        node = flow.source(node)
        if node in made:
            return made[node]
        if operator_of(node) != "relu":
            return None
        node = node.args[0]
