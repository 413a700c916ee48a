# SPDX-License-Identifier: Apache-2.0
"""Biases of layers that compute in integers become int32, with the scale of their sums: that of the input times that of
the weight.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of
from fxslim.export.passes.grids import Grid, axis_of, constant_weight, grid_of_value, is_operator

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

_LARGEST = 2**31 - 1
# What a bias takes of int32 where the weight makes room for it; of float32's exponents the step of the sums.
_ROOM, _TINY = 2.0**30, 2.0**-120
_log = logging.getLogger(__name__)


def store_biases_as_integers(model: ir.Model) -> bool:
    """Whether anything changed. Biases that models add in eval mode are whole steps already, and stay what they are.

    Others move by up to half of ``s_x * s_w``: of norms that only the export finds, and in files of others. A value
    next to a bound between two steps then falls to the other side, and deep networks amplify that.

    ONNX Runtime stores float biases as int32 itself, and cuts off what int32 does not hold. An output whose bias is too
    large for the steps of its sums, as that of a filter that has died, gets a coarser weight: beside such a bias the
    products are next to nothing. A layer whose products alone could pass int32 keeps its float bias.
    """
    edit = GraphEdit(model)
    for node in list(model.graph):
        if is_operator(node, "Conv", "Gemm", "ConvTranspose") and len(node.inputs) > 2:
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
    stored, step, fits = _in_steps(bias, grid, integers, scale, channels)
    if not fits.all() and np.isfinite(bias).all():
        integers, scale = _coarser(bias, grid, integers, scale, channels, fits)
        stored, step, fits = _in_steps(bias, grid, integers, scale, channels)
        if fits.all():
            _replace_weight(edit, node, dequantize, integers, scale)
    if not fits.all():
        _log.warning(
            "%s keeps its bias in float: int32 does not hold it together with all sums of products, in steps of %.3g, "
            "the scale of the input times that of its weight", node.name, step.min(),
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
    """Where a weight has its output channels; None for a Gemm that is no layer, and where no axis has them all."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if node.attributes.get_int("group", 1) == 1 else None
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or node.attributes.get_int("transA", 0) == 1:
        return None
    return 0 if node.attributes.get_int("transB", 0) == 1 else 1


def _in_steps(
    bias: np.ndarray, grid: Grid, integers: np.ndarray, scale: np.ndarray, channels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bias in steps of the sums, these steps, and of which outputs no sum can leave int32, whatever the input."""
    import numpy as np

    step = np.float32(grid.scale) * scale.reshape(-1)
    with np.errstate(all="ignore"):
        stored = np.rint(bias.reshape(-1).astype(np.float64) / step.astype(np.float64))
    others = tuple(axis for axis in range(integers.ndim) if axis != channels)
    reach = max(grid.bounds[1] - grid.zero_point, grid.zero_point - grid.bounds[0])
    sums = np.abs(integers.astype(np.float64)).sum(axis=others) * reach
    return stored, step, np.isfinite(stored) & (np.abs(stored) + sums <= _LARGEST) & (step > 0)


def _coarser(
    bias: np.ndarray, grid: Grid, integers: np.ndarray, scale: np.ndarray, channels: int, fits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weight with scales at which its biases take half of int32, where its own are finer and do not fit."""
    import numpy as np

    least = np.maximum(np.abs(bias.reshape(-1)).astype(np.float64) / _ROOM, _TINY) / grid.scale
    least = np.where(fits, 0.0, least)
    wanted = np.maximum(scale.reshape(-1), least if scale.size > 1 else least.max()).astype(np.float32)
    shape = [-1 if axis == channels else 1 for axis in range(integers.ndim)]
    factors = (scale.reshape(-1).astype(np.float64) / wanted).reshape(shape if scale.size > 1 else [1] * integers.ndim)
    return np.rint(integers * factors).astype(np.int8), wanted.reshape(scale.shape)


def _replace_weight(
    edit: GraphEdit, node: ir.Node, dequantize: ir.Node, integers: np.ndarray, scale: np.ndarray
) -> None:
    """Let one layer read another weight; who else reads the old one keeps it."""
    import numpy as np

    stem = "coarser_weight"
    inputs = [edit.constant(integers, stem), edit.constant(scale, f"{stem}_scale")]
    inputs.append(edit.constant(np.zeros(scale.shape, dtype=np.int8), f"{stem}_zero_point"))
    attributes = {"axis": axis_of(dequantize, integers.ndim)} if scale.ndim else {}
    old = node.inputs[1]
    node.replace_input_with(1, edit.node("DequantizeLinear", inputs, attributes, before=node, like=old, stem=stem))
    if old is not None and not old.uses() and not old.is_graph_output():
        edit.remove(dequantize)
