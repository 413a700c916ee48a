# SPDX-License-Identifier: Apache-2.0
"""Weights are stored the way they are read: turning a dequantized constant becomes turning its integers, once; and each
weight has a zero point of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of, readers
from fxslim.export.passes.grids import axis_of, is_operator

if TYPE_CHECKING:
    import onnx_ir as ir


def turn_weights(model: ir.Model) -> bool:
    """Whether anything changed: ``Transpose(DQ(weight))`` is ``DQ`` of the transposed weight, exactly."""
    import numpy as np

    edit = GraphEdit(model)
    for node in list(model.graph):
        value = node.inputs[0] if is_operator(node, "Transpose") else None
        dequantize = None if value is None else value.producer()
        if dequantize is None or not is_operator(dequantize, "DequantizeLinear"):
            continue
        stored, scale = dequantize.inputs[0], array_of(dequantize.inputs[1])
        integers = array_of(stored)
        if stored is None or integers is None or scale is None or dequantize.attributes.get_int("block_size", 0) > 0:
            continue
        order = list(node.attributes.get_ints("perm", range(integers.ndim)[::-1]))
        turned = edit.constant(np.ascontiguousarray(integers.transpose(order)), f"{stored.name}_t")
        axis = order.index(axis_of(dequantize, integers.ndim)) if scale.size != 1 else 0
        attributes = {**dequantize.attributes, "axis": axis}
        result = edit.node(
            "DequantizeLinear",
            [turned, *dequantize.inputs[1:]],
            attributes,
            before=node,
            like=node.outputs[0],
            stem=f"{node.outputs[0].name}_dq",
        )
        edit.hand_over(node.outputs[0], result)
        edit.remove(node)
    return edit.changed


def separate_zero_points(model: ir.Model) -> bool:
    """Whether anything changed. ONNX Runtime's exact mode for x86 (``session.x64quantprecision``) rewrites the zero
    point of each int8 weight, and fails to load a file where two weights share one.
    """
    edit = GraphEdit(model)
    for value in list(model.graph.initializers.values()):
        held = array_of(value)
        if held is None or str(held.dtype) != "int8":
            continue
        uses = [
            (node, index)
            for node, index in readers(value)
            if index == 2 and is_operator(node, "DequantizeLinear") and array_of(node.inputs[0]) is not None
        ]
        for node, index in uses[1:]:
            node.replace_input_with(index, edit.constant(held.copy(), f"{value.name}_of_{node.name}"))
    return edit.changed


def drop_unread_constants(model: ir.Model) -> bool:
    """Whether anything changed: initializers that nobody reads any more would still be written to the file."""
    unread = [
        name
        for name, value in model.graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    ]
    for name in unread:
        del model.graph.initializers[name]
    return bool(unread)
