# SPDX-License-Identifier: Apache-2.0
"""Operators that move values, or pick some of them: what was on a grid stays on it, and quantizing before is the same
as quantizing behind.

With Q and DQ of one grid, ``f(x) = DQ(Q(x))`` works on each value alone and never decreases. So it can trade places
with what only copies values (views, Slice, Gather, Concat, ...) and with a largest value (MaxPool, ReduceMax); and
``f(f(x)) == f(x)``: an integer n below 2**16 gives n * scale and back within two roundings of float32, far less than
half a step. Padding with 0 adds a value of the grid. NaN is left out: ONNX does not say which integer it becomes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import array_of

if TYPE_CHECKING:
    import onnx_ir as ir

# All values of their result are values of input 0.
_COPIES = frozenset(
    """
    Identity Reshape Flatten Transpose Squeeze Unsqueeze Slice Split Gather GatherElements GatherND Expand Tile
    DepthToSpace SpaceToDepth
    """.split()
)
_LARGEST = frozenset(("GlobalMaxPool", "ReduceMax"))


def moved_inputs(node: ir.Node | None) -> list[int]:
    """Places of the inputs whose values a node moves; none for a node that computes."""
    if node is None or node.domain not in ("", "ai.onnx"):
        return []
    if node.op_type == "Concat":
        return list(range(len(node.inputs)))
    if node.op_type in _COPIES or node.op_type in _LARGEST:
        return [0]
    kept = {"MaxPool": _max_pool_keeps, "Resize": _resize_keeps, "Pad": _pad_keeps}.get(node.op_type)
    return [0] if kept is not None and kept(node) else []


def _max_pool_keeps(node: ir.Node) -> bool:
    """Each window holds a value of the input: no indices are asked for, and none lies in the padding alone."""
    if len(node.outputs) > 1 and node.outputs[1].uses():
        return False
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    kernel = node.attributes.get_ints("kernel_shape", [])
    pads = node.attributes.get_ints("pads", [0] * (2 * len(kernel)))
    dilations = node.attributes.get_ints("dilations", [1] * len(kernel))
    if any(step != 1 for step in dilations) and any(pads):
        return False
    return all(pad < size for pad, size in zip(pads, [*kernel, *kernel], strict=True))


def _resize_keeps(node: ir.Node) -> bool:
    """The nearest value, and none from outside."""
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return False
    return node.attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"


def _pad_keeps(node: ir.Node) -> bool:
    """Values of the input, or 0."""
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    value = array_of(node.inputs[2])
    return value is not None and not value.any()


def is_moving(node: ir.Node | None) -> bool:
    """Whether a node only moves values."""
    return bool(moved_inputs(node))
