# SPDX-License-Identifier: Apache-2.0
"""Weights of 4 bits and less take half a byte each, in files of an opset that knows INT4."""

from typing import Any

from torch import nn

from fxslim.export.onnx_packages import onnx_package
from fxslim.nn.quantizers.stored_weights import StoredWeight

LEAST_OPSET = 21


def pack_four_bits(written: Any, model: nn.Module) -> None:
    """Store what fits into INT4, and its zero points, so; ``model`` is what was written."""
    if written.opset_imports.get("", 0) < LEAST_OPSET:
        return
    narrow = [
        f"{name}.integers"
        for name, module in model.named_modules()
        if isinstance(module, StoredWeight) and module.integers is not None and module.bits <= 4
        if int(module.integers.min()) >= -8 and int(module.integers.max()) <= 7
    ]
    values = dict(written.graph.initializers)
    for name in filter(values.__contains__, narrow):
        for place, use in enumerate(tuple(values[name].uses())):
            if use.node.op_type == "DequantizeLinear":
                for number in (0, 2):
                    use.node.replace_input_with(
                        number, _packed(written, use.node.inputs[number], f"{name}.{place}.{number}")
                    )


def _packed(written: Any, given: Any, name: str) -> Any:
    ir = onnx_package("onnx_ir")
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.INT4),
        shape=given.shape,
        const_value=ir.tensor(given.const_value.numpy(), dtype=ir.DataType.INT4),
    )
    written.graph.register_initializer(value)
    return value
