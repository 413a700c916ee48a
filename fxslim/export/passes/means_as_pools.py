# SPDX-License-Identifier: Apache-2.0
"""A mean over all places of an image becomes GlobalAveragePool, which ONNX Runtime computes in integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.graph_edits import GraphEdit, array_of, dims_of
from fxslim.export.passes.grids import grid_of_value, is_operator
from fxslim.export.passes.moved_pairs import wanted_grids

if TYPE_CHECKING:
    import onnx_ir as ir


def write_means_as_pools(model: ir.Model) -> bool:
    """Whether anything changed. The same mean; a sum in another order may differ in its last bits.

    Only where the mean is read from a grid and put on one; elsewhere nothing is won. And only where the steps of the
    two are within a factor of 256: beyond, ONNX Runtime loads the file, and its kernel fails with "parameter out of
    computation range" once it runs.
    """
    edit = GraphEdit(model)
    wanted = wanted_grids(model)
    for node in list(model.graph):
        grid = wanted.get(node.outputs[0]) if is_operator(node, "ReduceMean") else None
        given = grid_of_value(node.inputs[0]) if grid is not None else None
        if grid is not None and given is not None and 1 / 255 < given.scale / grid.scale < 255:
            _write(edit, node)
    return edit.changed


def _write(edit: GraphEdit, node: ir.Node) -> None:
    import numpy as np

    value, result = node.inputs[0], node.outputs[0]
    dims, axes = dims_of(value), _axes(node)
    if value is None or dims is None or axes is None or len(dims) < 3:
        return
    if sorted(axis % len(dims) for axis in axes) != list(range(2, len(dims))):
        return
    keeps = node.attributes.get_int("keepdims", 1) == 1
    stem = result.name or "mean"
    pooled = edit.node("GlobalAveragePool", [value], before=node, like=result if keeps else None, stem=f"{stem}_pooled")
    pooled.type = value.type
    last = pooled
    if not keeps:
        places = edit.constant(np.arange(2, len(dims), dtype=np.int64), "places")
        last = edit.node("Squeeze", [pooled, places], before=node, like=result, stem=f"{stem}_flat")
    edit.hand_over(result, last)
    edit.remove(node)


def _axes(node: ir.Node) -> list[int] | None:
    """Over which dimensions; None where that is computed, or all."""
    axes = node.attributes.get_ints("axes", None)
    if axes is None and len(node.inputs) > 1:
        held = array_of(node.inputs[1])
        axes = None if held is None else held.reshape(-1).tolist()
    return None if not axes else [int(axis) for axis in axes]
