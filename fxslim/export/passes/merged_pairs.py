# SPDX-License-Identifier: Apache-2.0
"""Pairs of Q and DQ in a row with the same grid become one; what nobody reads vanishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, readers
from fxslim.export.passes.grids import Grid, grid_of, grid_of_value, is_operator, quantizing
from fxslim.export.passes.moving import is_moving

if TYPE_CHECKING:
    import onnx_ir as ir


def merge_pairs(model: ir.Model) -> bool:
    """Whether anything changed. Exact: an integer that is dequantized and quantized again with one grid is the same.

    Runtimes look for exactly one Q behind an operator, so two of the same grid behind one value become one as well.
    """
    edit = GraphEdit(model)
    for node in list(model.graph):
        if is_operator(node, "QuantizeLinear"):
            _merge_quantized(edit, node)
        elif is_operator(node, "DequantizeLinear"):
            _merge_twins(edit, node)
    _remove_unread(edit)
    return edit.changed


def _merge_quantized(edit: GraphEdit, node: ir.Node) -> None:
    grid = grid_of(node)
    value, result = node.inputs[0], node.outputs[0]
    if grid is None or value is None or result.is_graph_output():
        return
    if grid_of_value(value) == grid:
        dequantize = value.producer()
        assert dequantize is not None
        integers = dequantize.inputs[0]
        assert integers is not None
        if result.uses():
            edit.hand_over(result, integers)
        return
    _merge_twins(edit, node)


def _merge_twins(edit: GraphEdit, node: ir.Node) -> None:
    """Let nodes of the same grid behind one value be one: the first."""
    grid = grid_of(node)
    value = node.inputs[0]
    if grid is None or value is None or not node.outputs[0].uses():
        return
    for twin, index in readers(value):
        if twin is node or index != 0 or twin.op_type != node.op_type or twin.graph is not node.graph:
            continue
        if not twin.outputs[0].is_graph_output() and twin.outputs[0].uses() and _grid_as(twin, node) == grid:
            edit.hand_over(twin.outputs[0], node.outputs[0])


def _grid_as(twin: ir.Node, node: ir.Node) -> Grid | None:
    return grid_of(twin) if is_operator(twin, node.op_type) else None


def _remove_unread(edit: GraphEdit) -> None:
    """Q, DQ and moves without readers, from the last to the first."""
    for node in reversed(list(edit.graph)):
        if not (is_operator(node, "QuantizeLinear", "DequantizeLinear") or is_moving(node)):
            continue
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            edit.remove(node)


def quantizers_behind(value: ir.Value) -> list[Grid] | None:
    """The grids of the Q nodes that alone read a value; None if anything else reads it, or nothing."""
    found = readers(value)
    if value.is_graph_output() or not found:
        return None
    grids = [quantizing(node, index) for node, index in found]
    return None if None in grids else [grid for grid in grids if grid is not None]
