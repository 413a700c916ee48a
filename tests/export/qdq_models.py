# SPDX-License-Identifier: Apache-2.0
"""Builds small QDQ files for tests, and runs files as they are written, without fusing anything."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "float32": TensorProto.FLOAT}


class QdqBuilder:
    """Nodes and initializers of one graph; each method gives the name of the tensor that it makes."""

    def __init__(self) -> None:
        self.nodes: list = []
        self.initializers: list = []

    def constant(self, name: str, values) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_node", **attributes))
        return output

    def factors(self, name: str, scale, zero_point, dtype: str) -> list[str]:
        scale = np.asarray(scale, np.float32)
        zero_points = np.broadcast_to(np.asarray(zero_point, dtype), scale.shape)
        return [self.constant(f"{name}_scale", scale), self.constant(f"{name}_zero", zero_points)]

    def quantizer(self, x: str, scale, zero_point=0, dtype="int8", **attributes) -> str:
        factors = self.factors(x, scale, zero_point, dtype)
        return self.node("QuantizeLinear", [x, *factors], f"{x}_q", **attributes)

    def activation(self, x: str, scale, zero_point=0, dtype="int8", **attributes) -> str:
        q = self.quantizer(x, scale, zero_point, dtype, **attributes)
        return self.node("DequantizeLinear", [q, f"{x}_scale", f"{x}_zero"], f"{x}_dq", **attributes)

    def stored(self, name: str, integers, scale, zero_point=0, **attributes) -> str:
        """A constant stored as integers."""
        integers = np.asarray(integers)
        factors = self.factors(name, scale, zero_point, integers.dtype.name)
        return self.node("DequantizeLinear", [self.constant(name, integers), *factors], f"{name}_dq", **attributes)

    def model(self, inputs: dict, outputs: dict, opset: int = 17, **names):
        """``{name: (type, shape)}``."""
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info(name, TYPES[t], shape) for name, (t, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, TYPES[t], shape) for name, (t, shape) in outputs.items()],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **names)


def save(model, path: Path) -> Path:
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def run(model, **inputs):
    """The first output; every node is computed as written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def one_layer(
    kind: str, *, dtype="int8", scale=0.125, zero_point=0, weight_scale=0.25, bias=None, groups=1, seed=0, size=5
):
    """Input, weight and perhaps a bias (int32 or float32 array, one per channel) of one quantized layer."""
    rng, new = np.random.default_rng(seed), QdqBuilder()
    x = new.activation("x", scale, zero_point, dtype)
    attributes: dict = {"group": groups} if kind.startswith("Conv") else {}
    cin, cout = 2 * groups, 3 * groups
    shapes = {
        "Conv": (cout, cin // groups, 2, 2),
        "ConvTranspose": (cin, cout // groups, 2, 2),
        "Gemm": (cout, cin),
        "MatMul": (cin, cout),
    }
    if kind == "Gemm":
        attributes["transB"] = 1
    weight = rng.integers(-127, 128, shapes[kind]).astype(np.int8)
    along = {"axis": 1 if kind == "ConvTranspose" else 0} if np.ndim(weight_scale) else {}
    inputs = [x, new.stored("w", weight, weight_scale, **along)]
    if bias is not None and bias.dtype == np.int32:
        product = np.float32(scale) * np.asarray(weight_scale, np.float32)
        product = np.tile(product, groups) if kind == "ConvTranspose" and product.ndim else product
        inputs.append(new.stored("b", bias, product, **({"axis": 0} if product.ndim else {})))
    elif bias is not None:
        inputs.append(new.constant("b", bias))
    new.node(kind, inputs, "y", **attributes)
    shape = [2, cin, size, size] if kind.startswith("Conv") else [2, cin]
    model = new.model({"x": ("float32", shape)}, {"y": ("float32", [None] * len(shape))})
    return model, shape
