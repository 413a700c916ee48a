# SPDX-License-Identifier: Apache-2.0
"""Builds a new ONNX model from a QDQ file, node by node; a form says what quantizers and layers become."""

from typing import Any, Protocol

import numpy as np

from fxslim.export.graph_lookups import Array, names_read
from fxslim.export.integer_grids import grid_constant
from fxslim.export.integer_layers import IntegerLayer
from fxslim.export.qdq_files import QdqModel, QuantizedActivation


class Form(Protocol):
    """What becomes of the three kinds of nodes that a QDQ file marks; all others are kept."""

    def quantizer(self, new: "RebuiltGraph", activation: QuantizedActivation) -> None:
        """A QuantizeLinear of an activation."""
        ...

    def dequantizer(self, new: "RebuiltGraph", activation: QuantizedActivation, node: Any) -> None:
        """A DequantizeLinear of an activation."""
        ...

    def layer(self, new: "RebuiltGraph", layer: IntegerLayer) -> None:
        """A layer of which input and weight are quantized."""
        ...


class RebuiltGraph:
    """Nodes and constants of the new model. Names of the old graph's tensors stay; new ones are never among them."""

    def __init__(self, source: QdqModel) -> None:
        self.source, self.onnx = source, source.graph.onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._shared: dict[tuple[str, str], str] = {}
        graph = source.graph
        self._taken = {*graph.initializers, *graph.producers, *graph.readers, *graph.outputs}
        self._taken |= {info.name for info in graph.graph.input}

    def unique(self, name: str) -> str:
        """The name, with a number behind it where it is taken."""
        number, found = 1, name
        while found in self._taken:
            number, found = number + 1, f"{name}_{number}"
        self._taken.add(found)
        return found

    def add(self, kind: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        """A new node; gives its output."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def add_layer(self, layer: IntegerLayer, inputs: list[str], output: str) -> None:
        """The layer's node with its attributes, on other tensors."""
        node = self.onnx.NodeProto()
        node.CopyFrom(layer.node)
        del node.input[:], node.output[:]
        node.input.extend(inputs)
        node.output.append(output)
        self.nodes.append(node)

    def constant(self, name: str, values: Array) -> str:
        """A new initializer; gives its name."""
        name = self.unique(name)
        self.constants[name] = values
        return name

    def shared_constant(self, role: str, old: str, name: str, values: Array) -> str:
        """The initializer that stands for the old graph's tensor ``old``, made once."""
        if (role, old) not in self._shared:
            self._shared[role, old] = self.constant(name, values)
        return self._shared[role, old]


def rebuild(source: QdqModel, form: Form) -> Any:
    """The new ``ModelProto``; the source is left as it is."""
    new = RebuiltGraph(source)
    for node in source.graph.graph.node:
        output = node.output[0] if node.output else ""
        if output in source.quantizers:
            form.quantizer(new, source.quantizers[output])
        elif output in source.activations:
            form.dequantizer(new, source.activations[output], node)
        elif output in source.layers:
            form.layer(new, source.layers[output])
        elif node.op_type not in ("QuantizeLinear", "DequantizeLinear") and not _is_folded(source, node):
            new.nodes.append(node)
    _add_old_constants(new)
    return _assemble(new)


def _is_folded(source: QdqModel, node: Any) -> bool:
    if node.op_type not in ("Constant", "Identity", "Transpose"):
        return False
    name = node.output[0]
    return source.graph.constant(name) is not None or grid_constant(source.graph, name) is not None


def _add_old_constants(new: RebuiltGraph) -> None:
    """Constants that kept nodes read: as they are, or as the floats that they are rounded to."""
    graph = new.source.graph
    made = {name for node in new.nodes for name in node.output}
    wanted = dict.fromkeys([*(name for node in new.nodes for name in names_read(node)), *sorted(graph.outputs)])
    for name in wanted:
        if name in made or name in new.constants:
            continue
        if name in graph.initializers:
            new.constants[name] = graph.initializers[name]
        elif name in graph.producers:
            stored = grid_constant(graph, name)
            value = graph.constant(name) if stored is None else stored.floats()
            if value is not None:
                new.constants[name] = value


def _fill(tensor: Any, name: str, values: Array, onnx: Any) -> None:
    # In place, since protobuf can't copy a tensor of 2 GiB.
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor.dims.extend(values.shape)
    tensor.raw_data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _assemble(new: RebuiltGraph) -> Any:
    old = new.source.graph
    model = new.onnx.ModelProto()
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, name, getattr(old.model, name))
    model.opset_import.extend(old.model.opset_import)
    model.metadata_props.extend(old.model.metadata_props)
    model.functions.extend(old.model.functions)
    graph = model.graph
    graph.name, graph.doc_string = old.graph.name, old.graph.doc_string
    graph.node.extend(new.nodes)
    for name in list(new.constants):  # one at a time: together they can be gigabytes, twice
        value = new.constants.pop(name)
        if isinstance(value, np.ndarray):
            _fill(graph.initializer.add(), name, value, new.onnx)
        else:
            graph.initializer.append(value)
    graph.input.extend(info for info in old.graph.input if info.name not in old.initializers)
    graph.output.extend(old.graph.output)
    for output in graph.output:
        if output.name in new.source.quantizers:
            output.type.tensor_type.elem_type = new.onnx.TensorProto.INT8
    return model
