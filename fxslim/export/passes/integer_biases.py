# SPDX-License-Identifier: Apache-2.0
"""Biases of layers that compute in integers become int32, with the scale of their sums: that of the input times that of
the weight.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of
from fxslim.export.passes.grids import axis_of, constant_weight, grid_of_value, is_operator

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

_LARGEST = 2**31 - 1
_log = logging.getLogger(__name__)


def store_biases_as_integers(model: ir.Model) -> bool:
    """Whether anything changed. Biases that models add in eval mode are whole steps already, and stay what they are.

    Others move by up to half of ``s_x * s_w``: of norms that only the export finds, and in files of others. A value
    next to a bound between two steps then falls to the other side, and deep networks amplify that.

    A layer whose bias and products together could pass int32 keeps its float bias, and with it float arithmetic.
    """
    edit = GraphEdit(model)
    for node in list(model.graph):
        if is_operator(node, "Conv", "Gemm") and len(node.inputs) > 2:
            _store(edit, node)
    return edit.changed


def _store(edit: GraphEdit, node: ir.Node) -> None:
    import numpy as np

    grid, weight, bias = grid_of_value(node.inputs[0]), constant_weight(node.inputs[1]), array_of(node.inputs[2])
    if grid is None or weight is None or bias is None or grid.dtype not in ("uint8", "int8"):
        return
    dequantize, integers, scale = weight
    channels = _output_axis(node)
    if channels is None or str(bias.dtype) != "float32" or bias.size != integers.shape[channels]:
        return
    if scale.size != 1 and axis_of(dequantize, integers.ndim) != channels:
        return
    step = np.float32(grid.scale) * scale.reshape(-1)
    with np.errstate(all="ignore"):
        stored = np.rint(bias.reshape(-1).astype(np.float64) / step.astype(np.float64))
    if not _fits(stored, integers, channels, grid.bounds, grid.zero_point) or not (step > 0).all():
        _log.warning(
            "%s keeps its bias in float, and runs in float: int32 does not hold it in steps of %.3g, the scale of the "
            "input times that of its weight", node.name, step.min(),
        )  # fmt: skip
        return
    stem = f"{_stem(node)}_q"
    zero = np.zeros(step.shape if scale.size != 1 else (), dtype=np.int32)
    held = edit.constant(stored.astype(np.int32), stem)
    factors = [edit.constant(step.reshape(zero.shape), f"{stem}_scale"), edit.constant(zero, f"{stem}_zero_point")]
    attributes = {"axis": 0} if scale.size != 1 else {}
    result = edit.node("DequantizeLinear", [held, *factors], attributes, before=node, stem=f"{stem}_dq")
    import onnx_ir as ir

    result.shape, result.type = held.shape, ir.TensorType(ir.DataType.FLOAT)
    node.replace_input_with(2, result)


def _stem(node: ir.Node) -> str:
    bias = node.inputs[2]
    return bias.name if bias is not None and bias.name else "bias"


def _output_axis(node: ir.Node) -> int | None:
    """Where a weight has its output channels; None for a Gemm that is no layer."""
    if node.op_type == "Conv":
        return 0
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or node.attributes.get_int("transA", 0) == 1:
        return None
    return 0 if node.attributes.get_int("transB", 0) == 1 else 1


def _fits(stored: np.ndarray, integers: np.ndarray, channels: int, bounds: tuple[int, int], zero_point: int) -> bool:
    """Whether no sum of one output channel can leave int32, whatever the input."""
    import numpy as np

    others = tuple(axis for axis in range(integers.ndim) if axis != channels)
    reach = max(bounds[1] - zero_point, zero_point - bounds[0])
    sums = np.abs(integers.astype(np.float64)).sum(axis=others) * reach
    return bool(np.isfinite(stored).all() and (np.abs(stored) + sums <= _LARGEST).all())
