# SPDX-License-Identifier: Apache-2.0
"""A QDQ file in standard float operators: runs anywhere, with the numbers of the ``ascend`` form."""

from typing import Any

import numpy as np

from fxslim.export.graph_lookups import node_name
from fxslim.export.integer_grids import HIGH, LOW
from fxslim.export.integer_layers import IntegerLayer
from fxslim.export.qdq_files import QdqModel, QuantizedActivation
from fxslim.export.rebuilt_graphs import RebuiltGraph, rebuild


def build_fake_quant_form(source: QdqModel) -> Any:
    """A ``ModelProto`` with Mul, Round, Add, Clip, Sub, Mul for each quantizer and rounded weights as floats.

    Mul takes float32(1 / scale), as AscendQuant does: where x / scale lies within rounding error of a half, the step
    may be the neighbour of the one that QuantizeLinear takes, which divides. Nothing else differs.
    """
    return rebuild(source, _FakeQuantForm())


class _FakeQuantForm:
    def __init__(self) -> None:
        self._levels: dict[str, str] = {}

    def quantizer(self, new: RebuiltGraph, activation: QuantizedActivation) -> None:
        node, name = activation.node, node_name(activation.node)

        def step(kind: str, before: str, **numbers: Any) -> str:
            inputs = [before] + [
                new.constant(f"{name}.{key}", np.array(value, np.float32)) for key, value in numbers.items()
            ]
            return new.add(kind, inputs, new.unique(f"{name}.{kind.lower()}"), f"{name}.{kind.lower()}")

        x = step("Mul", node.input[0], reciprocal=np.float32(1) / activation.scale)
        x = step("Add", step("Round", x), offset=activation.offset)
        x = step("Clip", x, low=LOW, high=HIGH)
        self._levels[node.output[0]] = x
        if node.output[0] in new.source.graph.outputs:
            new.add("Cast", [x], node.output[0], f"{name}.cast", to=new.onnx.TensorProto.INT8)

    def dequantizer(self, new: RebuiltGraph, activation: QuantizedActivation, node: Any) -> None:
        name = node_name(node)
        offset = new.constant(f"{name}.offset", np.array(activation.offset, np.float32))
        scale = new.constant(f"{name}.scale", np.array(activation.scale, np.float32))
        levels = self._levels[activation.node.output[0]]
        centred = new.add("Sub", [levels, offset], new.unique(f"{name}.sub"), f"{name}.sub")
        new.add("Mul", [centred, scale], node.output[0], f"{name}.mul")

    def layer(self, new: RebuiltGraph, layer: IntegerLayer) -> None:
        node, name = layer.node, node_name(layer.node)
        inputs = [node.input[0], new.shared_constant("weight", node.input[1], f"{name}.weight", layer.weight.floats())]
        bias = layer.float_bias()
        if bias is not None:
            inputs.append(new.constant(f"{name}.bias", bias))
        new.add_layer(layer, inputs, node.output[0])
