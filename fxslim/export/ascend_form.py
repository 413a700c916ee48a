# SPDX-License-Identifier: Apache-2.0
"""A QDQ file for Ascend's compiler: AscendQuant, layers on int8 and int32, AscendDequant and AscendAntiQuant."""

from typing import Any

import numpy as np

from fxslim.export.graph_lookups import Array, node_name
from fxslim.export.integer_layers import IntegerLayer
from fxslim.export.qdq_files import QdqModel, QuantizedActivation
from fxslim.export.rebuilt_graphs import RebuiltGraph, rebuild

FLOAT32 = 0  # as the compiler numbers types


def pack_dequant_parameter(product_scale: Array, weight_offset: int = 0) -> Array:
    """AscendDequant's uint64: bits 0 to 31 hold the float32 scale of products, bits 32 to 39 the weight's offset.

    >>> [hex(value) for value in pack_dequant_parameter(np.array([1.0, 0.5], np.float32), -1)]
    ['0xff3f800000', '0xff3f000000']
    """
    bits = np.ascontiguousarray(product_scale, np.float32).reshape(-1).view(np.uint32).astype(np.uint64)
    return bits | np.uint64((weight_offset & 0xFF) << 32)


def build_ascend_form(source: QdqModel) -> Any:
    """A ``ModelProto`` that Ascend's compiler takes and ONNX Runtime does not."""
    return rebuild(source, _AscendForm())


class _AscendForm:
    def quantizer(self, new: RebuiltGraph, activation: QuantizedActivation) -> None:
        node = activation.node
        reciprocal = float(np.float32(1) / activation.scale)
        grid = {"scale": reciprocal, "offset": float(activation.offset), "dst_type": "INT8"}
        new.add("AscendQuant", [node.input[0]], node.output[0], f"{_first_layer(new, activation)}.quant", **grid)

    def dequantizer(self, new: RebuiltGraph, activation: QuantizedActivation, node: Any) -> None:
        name, graph = node.output[0], new.source.graph
        if name not in graph.outputs and all(_is_integer(new, reader, name) for reader in graph.readers[name]):
            return
        grid = {"scale": float(activation.scale), "offset": float(activation.offset), "dst_type": "INT8"}
        new.add("AscendAntiQuant", [node.input[0]], name, f"{node_name(node)}.anti_quant", **grid)

    def layer(self, new: RebuiltGraph, layer: IntegerLayer) -> None:
        node, name = layer.node, node_name(layer.node)
        weight = new.shared_constant("weight", node.input[1], f"{name}.weight", layer.weight.values)
        inputs = [layer.quantized_input, weight]
        if layer.bias is not None:
            inputs.append(new.constant(f"{name}.bias", layer.bias))
        sums = new.unique(f"{name}.sums")
        new.add_layer(layer, inputs, sums)
        parameter = new.constant(f"{name}.dequant.param", pack_dequant_parameter(layer.product_scale))
        new.add("AscendDequant", [sums, parameter], node.output[0], f"{name}.dequant", dtype=FLOAT32)


def _is_integer(new: RebuiltGraph, reader: Any, name: str) -> bool:
    """Whether the reader is a layer that takes the integers themselves."""
    layer = new.source.layers.get(reader.output[0]) if reader.output else None
    return layer is not None and layer.node.input[0] == name


def _first_layer(new: RebuiltGraph, activation: QuantizedActivation) -> str:
    for dequantizer in activation.dequantizers:
        for reader in new.source.graph.readers[dequantizer.output[0]]:
            if _is_integer(new, reader, dequantizer.output[0]):
                return node_name(reader)
    return node_name(activation.node)
