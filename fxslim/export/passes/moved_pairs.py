# SPDX-License-Identifier: Apache-2.0
"""Pairs of Q and DQ stand on both sides of what moves values: behind the operator that computed the tensor, and at each
place where the tensor goes on.

A runtime with integer kernels takes ``DQ -> operator -> Q`` for one operator. Conv, MaxPool, Q is no such thing:
neither of the two has a Q and a DQ of its own. Numbers stay the same to the last bit (see ``moving``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of, readers
from fxslim.export.passes.grids import Grid, Pairs, grid_of_value, is_operator, quantizing
from fxslim.export.passes.moving import is_moving, moved_inputs

if TYPE_CHECKING:
    import onnx_ir as ir


def move_pairs(model: ir.Model) -> bool:
    """Whether anything changed."""
    edit = GraphEdit(model)
    pairs = Pairs(edit)
    wanted = wanted_grids(model)
    for node in list(model.graph):
        if is_moving(node):
            _put_before(node, wanted, pairs)
            _put_behind(node, wanted, pairs)
    return edit.changed


def wanted_grids(model: ir.Model) -> dict[ir.Value, Grid]:
    """Values that are read in no other way than on one grid: at once, or after they were moved."""
    wanted: dict[ir.Value, Grid] = {}
    unread: set[ir.Value] = set()
    for node in reversed(list(model.graph)):
        for value in node.outputs:
            _note(value, wanted, unread)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _note(value, wanted, unread)
    return wanted


def _note(value: ir.Value, wanted: dict[ir.Value, Grid], unread: set[ir.Value]) -> None:
    if value.is_graph_output():
        return
    grids: set[Grid | None] = set()
    for node, index in readers(value):
        if index in moved_inputs(node):
            results = [result for result in node.outputs if result not in unread]
            grids.update(wanted.get(result) for result in results)
        else:
            grids.add(quantizing(node, index))
    if not grids:
        unread.add(value)
    elif len(grids) == 1 and (grid := grids.pop()) is not None:
        wanted[value] = grid


def _put_before(node: ir.Node, wanted: Mapping[ir.Value, Grid], pairs: Pairs) -> None:
    """What is quantized after it was moved is quantized before: behind what made it, or at a part that others read."""
    read = [result for result in node.outputs if result.uses() or result.is_graph_output()]
    grids = {wanted.get(result) for result in read}
    if len(grids) != 1 or (grid := grids.pop()) is None:
        return
    for index in moved_inputs(node):
        value = node.inputs[index]
        if value is None or grid_of_value(value) is not None:
            continue
        if value in wanted:
            pairs.put_behind(value, grid)
        elif is_operator(node, "Concat"):
            pairs.put_at(node, index, grid)


def _put_behind(node: ir.Node, wanted: Mapping[ir.Value, Grid], pairs: Pairs) -> None:
    """What is dequantized and then moved is on the grid for those who read it next."""
    grids = {grid_of_value(node.inputs[index]) for index in moved_inputs(node)}
    if None in grids or _is_constant(node):
        return
    # Parts of several grids are joined on the grid that the whole goes on with.
    grid = grids.pop() if len(grids) == 1 else wanted.get(node.outputs[0])
    if grid is None:
        return
    for value in node.outputs:
        others = [reader for reader, index in readers(value) if quantizing(reader, index) != grid]
        if others or value.is_graph_output():
            pairs.put_behind(value, grid)


def _is_constant(node: ir.Node) -> bool:
    """Whether a weight is moved, and no activation."""
    given = [node.inputs[index] for index in moved_inputs(node)]
    makers = [value.producer() for value in given if value is not None]
    return all(maker is not None and array_of(maker.inputs[0]) is not None for maker in makers)
