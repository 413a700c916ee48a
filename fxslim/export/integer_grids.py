# SPDX-License-Identifier: Apache-2.0
"""The grids of QuantizeLinear and DequantizeLinear nodes, and constants that lie on one."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fxslim.errors import ExportError
from fxslim.export.graph_lookups import Array, GraphLookups, attribute_values, describe, permutation

LOW, HIGH = -128, 127


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Scales and zero points, one or one per slice of ``axis``; uint8 is read as int8 with every number 128 less."""

    scale: Array
    zero_point: Array
    dtype: str
    axis: int

    @property
    def shift(self) -> int:
        """What was taken off the file's integers to make them signed."""
        return 128 if self.dtype == "uint8" else 0

    def equals(self, other: "Grid") -> bool:
        """Whether both say the same numbers."""
        same = np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)
        return bool(same) and self.dtype == other.dtype and (self.scale.size == 1 or self.axis == other.axis)

    def aligned(self, values: Array, ndim: int) -> Array:
        """Scales or zero points in a shape that broadcasts against a tensor."""
        return values if values.size == 1 else values.reshape([-1 if d == self.axis else 1 for d in range(ndim)])

    def __str__(self) -> str:
        scale = f"{self.scale[0]:.9g}" + (f" and {self.scale.size - 1} more" if self.scale.size > 1 else "")
        return f"scale {scale}, zero point {int(self.zero_point[0]) + self.shift}, {self.dtype}"


@dataclass(frozen=True, kw_only=True, eq=False)
class GridConstant:
    """Integers that a constant is stored as, or is rounded to, with their grid."""

    values: Array
    grid: Grid

    def floats(self) -> Array:
        """What DequantizeLinear gives."""
        grid, ndim = self.grid, self.values.ndim
        whole = self.values.astype(np.float32)
        if grid.zero_point.any():
            whole = (self.values - grid.aligned(grid.zero_point, ndim)).astype(np.float32)
        whole *= grid.aligned(grid.scale, ndim)
        return whole

    def transposed(self, order: list[int]) -> "GridConstant":
        """With axes in another order."""
        axis = order.index(self.grid.axis) if self.grid.scale.size > 1 else self.grid.axis
        return GridConstant(values=self.values.transpose(order), grid=replace(self.grid, axis=axis))


def read_grid(graph: GraphLookups, node: Any, dtype: str | None = None) -> Grid:
    """The grid of a QuantizeLinear or DequantizeLinear; ``dtype`` is the integers' where the node states none."""
    scale = _constant_factor(graph, node, 1, "scale")
    if scale.dtype != np.float32:
        raise ExportError(f"{describe(node)}: its scale is {scale.dtype}; only float32 models can be converted")
    usable = np.isfinite(scale) & (scale > 0)
    with np.errstate(all="ignore"):
        usable &= np.isfinite(np.float32(1) / scale)
    if not usable.all():
        raise ExportError(f"{describe(node)}: scale {scale[~usable][0]!r} has no finite reciprocal; calibrate it again")
    found = attribute_values(node)
    if found.get("block_size", 0):
        raise ExportError(
            f"{describe(node)}: block_size {found['block_size']}; only scales per tensor or axis are known"
        )
    if found.get("output_dtype", 0) and node.op_type == "QuantizeLinear":
        dtype = np.dtype(graph.onnx.helper.tensor_dtype_to_np_dtype(found["output_dtype"])).name
    zero_point = np.zeros(scale.shape, np.int64)
    if len(node.input) > 2 and node.input[2]:
        stored = _constant_factor(graph, node, 2, "zero point")
        dtype, zero_point = stored.dtype.name, stored.astype(np.int64)
    dtype = dtype or "uint8"
    known = ("int8", "uint8", "int32") if node.op_type == "DequantizeLinear" else ("int8", "uint8")
    if dtype not in known:
        raise ExportError(f"{describe(node)}: integers of type {dtype}, expected int8 or uint8")
    if zero_point.shape != scale.shape:
        raise ExportError(f"{describe(node)}: {scale.size} scales but {zero_point.size} zero points")
    shift = 128 if dtype == "uint8" else 0
    return Grid(scale=scale, zero_point=zero_point - shift, dtype=dtype, axis=int(found.get("axis", 1)))


def _constant_factor(graph: GraphLookups, node: Any, index: int, what: str) -> Array:
    value = graph.constant(node.input[index])
    if value is None:
        raise ExportError(f"{describe(node)}: its {what} {node.input[index]!r} is computed, expected a constant")
    if value.ndim > 1 or value.size == 0:
        raise ExportError(
            f"{describe(node)}: its {what} has shape {list(value.shape)}, expected one number or one axis"
        )
    return value.reshape(-1)


def check_pair(quantizer: Any, grid: Grid, dequantizer: Any, other: Grid) -> None:
    """A QuantizeLinear and the DequantizeLinear behind it have the same factors."""
    if not grid.equals(other):
        raise ExportError(
            f"{describe(quantizer)} has {grid}, but {describe(dequantizer)} behind it has {other}: "
            "a pair needs the same factors in both"
        )


def grid_constant(graph: GraphLookups, name: str) -> GridConstant | None:
    """A constant behind DequantizeLinear, stored as integers or rounded to them by a QuantizeLinear; else None."""
    node = graph.producers.get(name)
    if node is None or not node.input:
        return None
    if node.op_type in ("Identity", "Transpose"):
        inner = grid_constant(graph, node.input[0])
        if inner is None or node.op_type == "Identity":
            return inner
        return inner.transposed(permutation(node, inner.values.ndim))
    if node.op_type != "DequantizeLinear":
        return None
    stored = graph.constant(node.input[0])
    if stored is not None:
        grid = _along_axis(node, read_grid(graph, node, stored.dtype.name), stored)
        if stored.dtype.name != grid.dtype:
            raise ExportError(f"{describe(node)}: integers are {stored.dtype.name}, its zero point is {grid.dtype}")
        return GridConstant(values=(stored ^ 128).view(np.int8) if grid.shift else stored, grid=grid)
    return _rounded_constant(graph, node)


def _rounded_constant(graph: GraphLookups, node: Any) -> GridConstant | None:
    quantizer = graph.producers.get(node.input[0])
    if quantizer is None or quantizer.op_type != "QuantizeLinear":
        return None
    floats = graph.constant(quantizer.input[0])
    if floats is None:
        return None
    if floats.dtype != np.float32:
        raise ExportError(f"{describe(quantizer)}: its input is {floats.dtype}; only float32 models can be converted")
    if not np.isfinite(floats).all():
        raise ExportError(f"{describe(quantizer)}: the constant {quantizer.input[0]!r} holds NaN or infinity")
    grid = _along_axis(quantizer, read_grid(graph, quantizer), floats)
    check_pair(quantizer, grid, node, _along_axis(node, read_grid(graph, node, grid.dtype), floats))
    steps = np.rint(floats / grid.aligned(grid.scale, floats.ndim))
    whole = np.clip(steps + grid.aligned(grid.zero_point, floats.ndim), LOW, HIGH)
    return GridConstant(values=whole.astype(np.int8), grid=grid)


def _along_axis(node: Any, grid: Grid, values: Array) -> Grid:
    """With an axis that counts from the front and has as many slices as the grid has scales."""
    if grid.scale.size == 1:
        return grid
    axis = grid.axis + values.ndim if grid.axis < 0 else grid.axis
    if not 0 <= axis < values.ndim or values.shape[axis] != grid.scale.size:
        raise ExportError(
            f"{describe(node)}: {grid.scale.size} scales along axis {grid.axis} of a constant of "
            f"shape {list(values.shape)}"
        )
    return replace(grid, axis=axis)
