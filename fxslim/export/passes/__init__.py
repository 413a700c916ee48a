# SPDX-License-Identifier: Apache-2.0
"""Edits of an ONNX graph with Q and DQ nodes, after which ONNX Runtime computes all of it in integers.

Each pass is one file, takes a model of ``onnx_ir``, edits it in place and says whether it changed anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxslim.export.passes.bounds_behind_grids import bound_integers, quantize_before_bounds
from fxslim.export.passes.held_bounds import drop_held_bounds
from fxslim.export.passes.integer_biases import store_biases_as_integers
from fxslim.export.passes.kept_as_written import keep_as_written
from fxslim.export.passes.linear_products import write_linear_as_gemm
from fxslim.export.passes.means_as_pools import write_means_as_pools
from fxslim.export.passes.merged_pairs import merge_pairs
from fxslim.export.passes.moved_pairs import move_pairs
from fxslim.export.passes.weight_views import drop_unread_constants, separate_zero_points, turn_weights

if TYPE_CHECKING:
    import onnx_ir as ir

_ONCE_BEFORE = (turn_weights, merge_pairs)
_REPEATED = (
    drop_held_bounds,
    quantize_before_bounds,
    move_pairs,
    merge_pairs,
    write_means_as_pools,
    write_linear_as_gemm,
)
_ONCE_BEHIND = (separate_zero_points, drop_unread_constants)


def settle(
    model: ir.Model, *, integer_bounds: bool = True, integer_biases: bool = True, as_written: bool = True
) -> ir.Model:
    """All passes in order, in place; the same model. The result settles to itself.

    Exact, but for biases (half a step of their int32) and the order in which a mean is summed. ``integer_bounds`` lets
    a Clip of integers stand between a Q and its DQ, where a grid is wider than a ReLU6; False keeps it in float, with
    pairs around it, for those who look for a DQ right behind each Q. Without ``integer_biases``, biases stay in float.
    ``as_written`` keeps ONNX Runtime from quantizing layers that are in float, and from joining two grids in a row.
    """
    for once in _ONCE_BEFORE:
        once(model)
    repeated = (*_REPEATED, bound_integers) if integer_bounds else _REPEATED
    changed = True
    while changed:
        changed = False
        for one in repeated:
            changed |= one(model)
    if integer_biases:
        store_biases_as_integers(model)
    if as_written:
        keep_as_written(model)
    for once in _ONCE_BEHIND:
        once(model)
    return model
