# SPDX-License-Identifier: Apache-2.0
"""Pairs of Q and DQ in a row with the same grid become one; what nobody reads vanishes."""

from __future__ import annotations

from collections.abc import Mapping
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
    order = {node: number for number, node in enumerate(model.graph)}
    for node in order:
        if is_operator(node, "QuantizeLinear"):
            _skip(edit, node)
        if is_operator(node, "QuantizeLinear", "DequantizeLinear"):
            _merge_twins(edit, node, order)
    _remove_unread(edit)
    return edit.changed


def _skip(edit: GraphEdit, node: ir.Node) -> None:
    """Let those who read what was dequantized and quantized again read the integers of before."""
    grid, value, result = grid_of(node), node.inputs[0], node.outputs[0]
    maker = None if value is None else value.producer()
    if grid is None or maker is None or grid_of_value(value) != grid or result.is_graph_output():
        return
    integers = maker.inputs[0]
    if integers is not None and result.uses():
        edit.hand_over(result, integers)


def _merge_twins(edit: GraphEdit, node: ir.Node, order: Mapping[ir.Node, int]) -> None:
    """Let nodes of the same grid behind one value be one: the first."""
    grid, value = grid_of(node), node.inputs[0]
    if grid is None or value is None or not node.outputs[0].uses():
        return
    twins = [twin for twin, index in readers(value) if index == 0 and twin in order and is_operator(twin, node.op_type)]
    twins = [twin for twin in twins if grid_of(twin) == grid]
    first = min(twins, key=order.__getitem__)
    for twin in twins:
        result = twin.outputs[0]
        if twin is not first and result.uses() and not result.is_graph_output():
            edit.hand_over(result, first.outputs[0])


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
