# SPDX-License-Identifier: Apache-2.0
"""QuantizeLinear and DequantizeLinear: their grids, by value, and pairs of the two."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

_INTEGERS = ("uint8", "int8", "uint16", "int16")


@dataclass(frozen=True)
class Grid:
    """One scale, a float32 above 0, and one zero point for a whole tensor: two are the same if their numbers are."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest integer of the type.

        >>> Grid(0.5, 0, "uint8").bounds
        (0, 255)
        """
        bits = int(self.dtype.removeprefix("u").removeprefix("int"))
        return (0, 2**bits - 1) if self.dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def quantized(self, number: float) -> int:
        """The integer of a number, computed as QuantizeLinear does: division and rounding in float32.

        >>> Grid(0.5, 10, "uint8").quantized(-100.0)
        0
        """
        import numpy as np

        low, high = self.bounds
        with np.errstate(over="ignore"):
            steps = np.rint(np.float32(number) / np.float32(self.scale))
        return int(np.clip(np.float64(steps) + self.zero_point, low, high))


def is_operator(node: ir.Node | None, *names: str) -> bool:
    """Whether a node is one of these operators of ONNX itself."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in names


def grid_of(node: ir.Node | None) -> Grid | None:
    """The grid of a Q or DQ node; None where it is no such node, has several scales, or is not made of constants."""
    if node is None or not is_operator(node, "QuantizeLinear", "DequantizeLinear"):
        return None
    scale = array_of(node.inputs[1])
    if scale is None or scale.size != 1 or str(scale.dtype) != "float32":
        return None
    if any(node.attributes.get_int(name, 0) for name in ("block_size", "output_dtype", "precision")):
        return None
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None:
        dtype = "uint8" if node.op_type == "QuantizeLinear" else _dtype_of(node.inputs[0])
        return _grid(float(scale.item()), 0, dtype)
    held = array_of(point)
    return None if held is None else _grid(float(scale.item()), held.item(), str(held.dtype))


def _dtype_of(value: ir.Value | None) -> str:
    held = array_of(value)
    if held is not None:
        return str(held.dtype)
    return "" if value is None or value.dtype is None else value.dtype.name.lower()


def _grid(scale: float, zero_point: int, dtype: str) -> Grid | None:
    if dtype not in _INTEGERS or not 0.0 < scale < 3.4e38 / 2**16:
        return None
    return Grid(scale, int(zero_point), dtype)


def quantizing(node: ir.Node, index: int = 0) -> Grid | None:
    """The grid that a node puts its input ``index`` on, if it is a Q node."""
    return grid_of(node) if index == 0 and is_operator(node, "QuantizeLinear") else None


def grid_of_value(value: ir.Value | None) -> Grid | None:
    """The grid that a value is on because a DQ node gave it."""
    node = None if value is None else value.producer()
    return grid_of(node) if is_operator(node, "DequantizeLinear") else None


def constant_weight(value: ir.Value | None) -> tuple[ir.Node, np.ndarray, np.ndarray] | None:
    """The DQ node, the integers and the scales of a weight that is stored in 8 bits around 0; None for other values."""
    node = None if value is None else value.producer()
    if node is None or not is_operator(node, "DequantizeLinear"):
        return None
    integers, scale = array_of(node.inputs[0]), array_of(node.inputs[1])
    point = array_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if integers is None or scale is None or str(integers.dtype) != "int8" or str(scale.dtype) != "float32":
        return None
    if node.attributes.get_int("block_size", 0) or (point is not None and point.any()):
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and point is None:
        return None
    return node, integers, scale


def axis_of(node: ir.Node, rank: int) -> int:
    """The dimension along which a Q or DQ node has its scales."""
    axis = node.attributes.get_int("axis", 1)
    return axis + rank if axis < 0 else axis


class Pairs:
    """Makes pairs of Q and DQ; one scale and one zero point of each grid are stored once."""

    def __init__(self, edit: GraphEdit) -> None:
        self._edit = edit
        self._constants = lru_cache(maxsize=None)(self._made)

    def _made(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        import numpy as np

        scale = self._edit.constant(np.asarray(grid.scale, dtype=np.float32), "grid_scale")
        return scale, self._edit.constant(np.asarray(grid.zero_point, dtype=grid.dtype), "grid_zero_point")

    def put_behind(self, value: ir.Value, grid: Grid) -> ir.Value:
        """Let all who read a value read it through a new pair; the dequantized value."""
        quantize, pair = self._made_behind(value, grid)
        self._edit.hand_over(value, pair)
        quantize.replace_input_with(0, value)
        return pair

    def _made_behind(self, value: ir.Value, grid: Grid) -> tuple[ir.Node, ir.Value]:
        import onnx_ir as ir

        maker = value.producer()
        scale, point = self._constants(grid)
        integers = self._edit.node("QuantizeLinear", [value, scale, point], behind=maker, stem=f"{value.name}_q")
        integers.shape, integers.type = value.shape, ir.TensorType(ir.DataType[grid.dtype.upper()])
        node = integers.producer()
        pair = self._edit.node(
            "DequantizeLinear", [integers, scale, point], behind=node, like=value, stem=f"{value.name}_dq"
        )
        assert node is not None
        return node, pair

    def put_at(self, node: ir.Node, index: int, grid: Grid) -> None:
        """Let one node read one of its inputs through a new pair."""
        value = node.inputs[index]
        assert value is not None
        _, pair = self._made_behind(value, grid)
        node.replace_input_with(index, pair)
