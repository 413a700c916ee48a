# SPDX-License-Identifier: Apache-2.0
"""Relu and Clip before a Q whose grid ends where they do are not needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of
from fxslim.export.passes.grids import Grid, is_operator
from fxslim.export.passes.merged_pairs import quantizers_behind

if TYPE_CHECKING:
    import onnx_ir as ir


def drop_held_bounds(model: ir.Model) -> bool:
    """Whether anything changed. Exact for all numbers: what lies outside of the bounds is quantized to the same end of
    the grid as the bound itself, since quantizing never decreases.
    """
    edit = GraphEdit(model)
    for node in list(model.graph):
        bounds = bounds_of(node)
        grids = quantizers_behind(node.outputs[0]) if bounds is not None else None
        value = node.inputs[0]
        if bounds is not None and value is not None and grids and all(_holds(grid, *bounds) for grid in grids):
            edit.hand_over(node.outputs[0], value)
            edit.remove(node)
    return edit.changed


def bounds_of(node: ir.Node) -> tuple[float, float] | None:
    """The lower and the upper bound of a Relu or a Clip; None for others, and for bounds that are computed."""
    if is_operator(node, "Relu"):
        return 0.0, math.inf
    if not is_operator(node, "Clip"):
        return None
    bounds = [-math.inf, math.inf]
    for place, value in enumerate(node.inputs[1:3]):
        if value is not None:
            held = array_of(value)
            if held is None or held.size != 1:
                return None
            bounds[place] = float(held.item())
    return (bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None


def _holds(grid: Grid, low: float, high: float) -> bool:
    lowest, highest = grid.bounds
    return grid.quantized(low) == lowest and grid.quantized(high) == highest
