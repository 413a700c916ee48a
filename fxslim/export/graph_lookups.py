# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph with look-ups: what gives a tensor, what reads it, and its value where that is constant."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from fxslim.errors import ExportError

Array = np.ndarray[Any, Any]


def import_onnx(needed_by: str) -> Any:
    """The optional package ``onnx``, with the parts that ``fxslim.export`` uses."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ExportError(f"{needed_by} needs the package onnx: pip install 'fxslim[onnx]'") from error
    return onnx


def node_name(node: Any) -> str:
    """The node's name, or that of its first output where it has none."""
    return node.name or node.output[0]


def describe(node: Any) -> str:
    """How errors name a node."""
    return f"{node.op_type} {node_name(node)!r}"


def attribute_values(node: Any) -> dict[str, Any]:
    """The node's attributes as Python values."""
    onnx = import_onnx("reading ONNX")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def subgraphs(node: Any) -> Iterator[Any]:
    """Bodies of If, Loop, Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def names_read(node: Any) -> Iterator[str]:
    """Tensors that a node reads, also from inside of its subgraphs."""
    yield from (name for name in node.input if name)
    for body in subgraphs(node):
        yield from (output.name for output in body.output)
        for inner in body.node:
            yield from names_read(inner)


class GraphLookups:
    """``producers[tensor]`` is a node, ``readers[tensor]`` are nodes; ``constant(tensor)`` is an array or None."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.onnx = import_onnx("reading ONNX")
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output if name}
        self.readers: defaultdict[str, list[Any]] = defaultdict(list)
        for node in self.graph.node:
            for name in names_read(node):
                self.readers[name].append(node)
        self.outputs = {output.name for output in self.graph.output}
        self._types = {
            info.name: info.type.tensor_type.elem_type
            for info in (*self.graph.input, *self.graph.value_info, *self.graph.output)
        }

    def declared_type(self, name: str) -> str | None:
        """The element type that the file states for a tensor, such as ``"FLOAT"``; None where it states none."""
        kind = self.initializers[name].data_type if name in self.initializers else self._types.get(name, 0)
        return str(self.onnx.TensorProto.DataType.Name(kind)) if kind else None

    def constant(self, name: str) -> Array | None:
        """The value of an initializer or of a Constant node, transposed where Transpose nodes follow."""
        if name in self.initializers:
            return self.onnx.numpy_helper.to_array(self.initializers[name])
        node = self.producers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return self._constant_node(node)
        if node.op_type in ("Identity", "Transpose"):
            value = self.constant(node.input[0])
            return (
                value if value is None or node.op_type == "Identity" else value.transpose(permutation(node, value.ndim))
            )
        return None

    def _constant_node(self, node: Any) -> Array | None:
        for key, value in attribute_values(node).items():
            if key == "value":
                return self.onnx.numpy_helper.to_array(value)
            if key in ("value_float", "value_floats"):
                return np.asarray(value, np.float32)
            if key in ("value_int", "value_ints"):
                return np.asarray(value, np.int64)
        return None


def permutation(node: Any, ndim: int) -> list[int]:
    """The axes of a Transpose node, which reverses them where it names none."""
    return list(attribute_values(node).get("perm", range(ndim)[::-1]))
