# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime would change on its own is kept as it is written: layers in float, and the first of two grids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of
from fxslim.export.passes.grids import Grid, grid_of_value, is_operator, quantizing
from fxslim.export.passes.moving import moved_inputs

if TYPE_CHECKING:
    import onnx_ir as ir


def keep_as_written(model: ir.Model) -> bool:
    """Whether anything changed.

    ONNX Runtime (seen with 1.32) gives a layer of float weights between a DQ and a Q weights of int8 with one scale,
    whoever wanted it in float, and makes one of two pairs in a row, so that values are rounded once. A Max of one
    input, a copy that it does not optimize away, keeps the DQ apart.
    """
    edit = GraphEdit(model)
    for node in list(model.graph):
        value = node.inputs[0] if node.inputs else None
        before = _origin(value)
        if value is None or before is None or not is_operator(before.producer(), "DequantizeLinear"):
            continue
        if _has_float_weight(node) or _is_second_grid(node, grid_of_value(before)):
            node.replace_input_with(0, edit.node("Max", [value], before=node, like=value, stem="kept_as_written"))
    return edit.changed


def _has_float_weight(node: ir.Node) -> bool:
    if not is_operator(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return False
    held = array_of(_origin(node.inputs[1]))
    return held is not None and str(held.dtype) == "float32"


def _is_second_grid(node: ir.Node, first: Grid | None) -> bool:
    second = quantizing(node)
    return first is not None and second is not None and first != second


def _origin(value: ir.Value | None) -> ir.Value | None:
    """Whose values these are, before they were moved."""
    node = None if value is None else value.producer()
    while node is not None and moved_inputs(node) == [0]:
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return value
