# SPDX-License-Identifier: Apache-2.0
"""Reads a QDQ file: activations between QuantizeLinear and DequantizeLinear, and layers on integers."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fxslim.errors import ExportError
from fxslim.export.graph_lookups import GraphLookups, describe, import_onnx, subgraphs
from fxslim.export.integer_grids import Grid, check_pair, grid_constant, read_grid
from fxslim.export.integer_layers import LAYER_TYPES, IntegerLayer, read_layer

OLDEST_OPSET = 11


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedActivation:
    """One QuantizeLinear of an activation, the DequantizeLinear nodes behind it, and their grid (one scale)."""

    node: Any
    grid: Grid
    dequantizers: list[Any]

    @property
    def scale(self) -> Any:
        """The float32 scale."""
        return self.grid.scale[0]

    @property
    def offset(self) -> int:
        """The signed zero point."""
        return int(self.grid.zero_point[0])


@dataclass(kw_only=True, eq=False)
class QdqModel:
    """``quantizers`` by the tensor they write, ``activations`` by the tensor that their dequantizers write, ``layers``
    by their first output."""

    graph: GraphLookups
    quantizers: dict[str, QuantizedActivation] = field(default_factory=dict)
    activations: dict[str, QuantizedActivation] = field(default_factory=dict)
    layers: dict[str, IntegerLayer] = field(default_factory=dict)


def load_qdq(path: str | os.PathLike[str]) -> QdqModel:
    """A QDQ file, checked."""
    onnx = import_onnx("convert_qat_model")
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ExportError(f"{path} is not a file; expected an ONNX file with QuantizeLinear and DequantizeLinear")
    try:
        model = onnx.load(path)
        _check_not_converted(model, path)
        onnx.checker.check_model(path)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{path} can't be read as ONNX: {type(error).__name__}: {str(error).strip()}") from error
    try:
        return read_qdq(model)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error


def read_qdq(model: Any) -> QdqModel:
    """The same for a ``ModelProto`` in memory, which is kept, not copied."""
    _check_opset(model)
    found = QdqModel(graph=GraphLookups(model))
    _check_bodies(found.graph)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            _read_quantizer(found, node)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] not in found.activations:
            _check_constant(found.graph, node)
    for node in model.graph.node:
        if node.op_type in LAYER_TYPES and (layer := read_layer(found.graph, node, found.activations)):
            found.layers[node.output[0]] = layer
    if not found.quantizers and not any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise ExportError(
            "it has no QuantizeLinear and no DequantizeLinear; export a model prepared with "
            "fxslim.prepare_qat or quantize"
        )
    return found


def _check_not_converted(model: Any, path: str) -> None:
    for node in model.graph.node:
        if node.op_type.startswith("Ascend"):
            raise ExportError(
                f"{path} is converted already: it holds {describe(node)}; convert the QDQ file it came from"
            )


def _check_opset(model: Any) -> None:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version < OLDEST_OPSET:
            raise ExportError(f"opset {opset.version} has no Round; export with opset {OLDEST_OPSET} or newer")


def _check_bodies(graph: GraphLookups) -> None:
    inner: Iterable[Any] = (body for node in graph.graph.node for body in subgraphs(node))
    for body in (*inner, *graph.model.functions):
        _refuse_inside(body)


def _refuse_inside(body: Any) -> None:
    for node in body.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise ExportError(f"{describe(node)} is inside of {body.name!r}; only the main graph can be converted")
        for deeper in subgraphs(node):
            _refuse_inside(deeper)


def _read_quantizer(found: QdqModel, node: Any) -> None:
    graph, output = found.graph, node.output[0]
    for reader in graph.readers[output]:
        if reader.op_type != "DequantizeLinear" or reader.input[0] != output:
            raise ExportError(f"{describe(node)} is read by {describe(reader)}, expected a DequantizeLinear")
    if graph.constant(node.input[0]) is not None:
        return
    kind = graph.declared_type(node.input[0])
    if kind not in (None, "FLOAT"):
        raise ExportError(
            f"{describe(node)}: its input {node.input[0]!r} is {kind}; only float32 models can be converted"
        )
    grid = read_grid(graph, node)
    if grid.scale.size > 1:
        raise ExportError(
            f"{describe(node)} has {grid.scale.size} scales for an activation; only weights may have one per "
            "channel: use one"
        )
    if not graph.readers[output] and output not in graph.outputs:
        return
    activation = QuantizedActivation(node=node, grid=grid, dequantizers=graph.readers[output])
    found.quantizers[output] = activation
    for dequantizer in activation.dequantizers:
        check_pair(node, grid, dequantizer, read_grid(graph, dequantizer, grid.dtype))
        found.activations[dequantizer.output[0]] = activation


def _check_constant(graph: GraphLookups, node: Any) -> None:
    if grid_constant(graph, node.output[0]) is None:
        raise ExportError(
            f"{describe(node)} reads {node.input[0]!r}, which is neither a constant nor the output of a QuantizeLinear"
        )
