# SPDX-License-Identifier: Apache-2.0
"""A linear layer on inputs of more than two dimensions, written as MatMul and Add, becomes a Gemm on two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of, dims_of, readers
from fxslim.export.passes.grids import constant_weight, grid_of_value, is_operator

if TYPE_CHECKING:
    import onnx_ir as ir


def write_linear_as_gemm(model: ir.Model) -> bool:
    """Whether anything changed.

    ONNX Runtime adds the bias of a Gemm in integers, that behind a MatMul in float.
    """
    edit = GraphEdit(model)
    for node in list(model.graph):
        if is_operator(node, "MatMul"):
            _write(edit, node)
    return edit.changed


def _write(edit: GraphEdit, node: ir.Node) -> None:
    import numpy as np

    value, weight = node.inputs[0], constant_weight(node.inputs[1])
    dims = dims_of(value)
    if value is None or weight is None or weight[1].ndim != 2 or grid_of_value(value) is None:
        return
    if dims is None or len(dims) < 3 or 0 in dims:
        return
    addition, bias = _bias_behind(node, weight[1].shape[1])
    if addition is None:
        return
    last = addition.outputs[0]
    flat = edit.constant(np.asarray([-1, weight[1].shape[0]], dtype=np.int64), "rows")
    shape = _shape_behind(edit, node, dims[:-1], weight[1].shape[1])
    stem = node.outputs[0].name or "linear"
    rows = edit.node("Reshape", [value, flat], before=node, stem=f"{stem}_rows")
    rows.type = value.type
    product = edit.node("Gemm", [rows, node.inputs[1], bias], before=node, stem=f"{stem}_gemm")
    product.type = value.type
    result = edit.node("Reshape", [product, shape], before=addition, like=last, stem=f"{stem}_shaped")
    edit.hand_over(last, result)
    edit.remove(addition)
    edit.remove(node)


def _shape_behind(edit: GraphEdit, node: ir.Node, leading: tuple[int | str | None, ...], last: int) -> ir.Value:
    """The shape of the result: constant if one size at most is unknown, else computed."""
    import numpy as np

    known = [dim if isinstance(dim, int) else -1 for dim in leading]
    if known.count(-1) <= 1:
        return edit.constant(np.asarray([*known, last], dtype=np.int64), "unfolded")
    # Of the integers: the dequantized tensor need not exist.
    dequantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    assert dequantize is not None
    sizes = edit.node("Shape", [dequantize.inputs[0]], {"start": 0, "end": -1}, before=node, stem="leading_sizes")
    size = edit.constant(np.asarray([last], dtype=np.int64), "last_size")
    return edit.node("Concat", [sizes, size], {"axis": 0}, before=node, stem="unfolded")


def _bias_behind(node: ir.Node, size: int) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add that alone reads a product, and the constant that it adds to the last dimension."""
    found = readers(node.outputs[0])
    if len(found) != 1 or node.outputs[0].is_graph_output() or not is_operator(found[0][0], "Add"):
        return None, None
    addition, index = found[0]
    bias = addition.inputs[1 - index]
    held = array_of(bias)
    return (addition, bias) if held is not None and held.shape == (size,) else (None, None)
