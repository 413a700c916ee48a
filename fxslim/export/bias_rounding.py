# SPDX-License-Identifier: Apache-2.0
"""Whether biases stored as int32 are all that sets a file apart from the same file with biases in float."""

from typing import Any

import numpy as np

from fxslim.export.passes.graph_edits import array_of

# Of a step of a bias: rounding, and float32.
_MOST_STEPS = 0.51


def largest_bias_error(stored: Any, floats: Any) -> float:
    """In steps of the int32 biases: half a step where they are what rounding makes of the others.

    Both are models of ``onnx_ir``, written from one torch model; infinity where they have other layers.
    """
    one, other = (_layers_with_bias(model) for model in (stored, floats))
    if [node.op_type for node in one] != [node.op_type for node in other]:
        return float("inf")
    return max((_error(a.inputs[2], b.inputs[2]) for a, b in zip(one, other, strict=True)), default=0.0)


def is_rounding(steps: float) -> bool:
    """Whether an error in steps is one of rounding."""
    return steps <= _MOST_STEPS


def _layers_with_bias(model: Any) -> list[Any]:
    return [node for node in model.graph if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2]


def _error(stored: Any, float_bias: Any) -> float:
    wanted, maker = array_of(float_bias), stored.producer()
    if wanted is None or maker is None or maker.op_type != "DequantizeLinear":
        held = array_of(stored)
        return 0.0 if stored is float_bias or _same(held, wanted) else float("inf")
    integers, scale = array_of(maker.inputs[0]), array_of(maker.inputs[1])
    if integers is None or scale is None or integers.size != wanted.size:
        return float("inf")
    steps = wanted.reshape(-1).astype(np.float64) / scale.reshape(-1).astype(np.float64)
    return float(np.abs(integers.reshape(-1) - steps).max(initial=0.0))


def _same(held: Any, wanted: Any) -> bool:
    return held is wanted or (held is not None and wanted is not None and np.array_equal(held, wanted))
