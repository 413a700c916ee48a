# SPDX-License-Identifier: Apache-2.0
"""A Relu or a Clip that the grid behind it does not hold stands behind the grid, so that the operator before it has a Q
of its own; there it can be computed on the integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, readers
from fxslim.export.passes.grids import Pairs, grid_of_value
from fxslim.export.passes.held_bounds import bounds_of
from fxslim.export.passes.merged_pairs import quantizers_behind

if TYPE_CHECKING:
    import onnx_ir as ir


# Of the types of grids, those that ONNX Runtime has a Clip for.
_CLIPPED = ("uint8", "int8")


def quantize_before_bounds(model: ir.Model) -> bool:
    """Whether anything changed: ``Q(clip(x))`` becomes ``Q(clip(DQ(Q(x))))``.

    Exact. Neither Q nor clip ever decreases, so where ``x`` and ``DQ(Q(x))`` lie on two sides of a bound, all between
    them, the bound too, has one integer.
    """
    edit = GraphEdit(model)
    pairs = Pairs(edit)
    for node in list(model.graph):
        if bounds_of(node) is None:
            continue
        value, grids = node.inputs[0], quantizers_behind(node.outputs[0])
        if value is None or not grids or len(set(grids)) > 1 or grid_of_value(value) is not None:
            continue
        if value.producer() is not None and len(value.uses()) == 1 and not value.is_graph_output():
            pairs.put_behind(value, grids[0])
    return edit.changed


def bound_integers(model: ir.Model) -> bool:
    """Whether anything changed: ``Q(clip(DQ(q)))`` of one grid becomes a Clip of the integers.

    Exact: a dequantized integer beyond a bound becomes the integer of the bound, and no other changes, because Q never
    decreases. DQ, Clip and Q in float cost about as much as what quantizing an image-sized layer saves.
    """
    import numpy as np

    edit = GraphEdit(model)
    for node in list(model.graph):
        bounds, grids = bounds_of(node), quantizers_behind(node.outputs[0])
        value = node.inputs[0] if bounds is not None and grids else None
        given, dequantize = grid_of_value(value), None if value is None else value.producer()
        if bounds is None or given is None or dequantize is None or not grids:
            continue
        if set(grids) != {given} or given.dtype not in _CLIPPED:
            continue
        integers = dequantize.inputs[0]
        ends = [edit.constant(np.asarray(given.quantized(bound), given.dtype), "bound") for bound in bounds]
        quantized = [reader for reader, _ in readers(node.outputs[0])]
        stem = f"{node.outputs[0].name}_q"
        result = edit.node("Clip", [integers, *ends], before=node, like=quantized[0].outputs[0], stem=stem)
        for quantize in quantized:
            edit.hand_over(quantize.outputs[0], result)
            edit.remove(quantize)
        edit.remove(node)
        if not dequantize.outputs[0].uses() and not dequantize.outputs[0].is_graph_output():
            edit.remove(dequantize)
    return edit.changed
