# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime makes of a model, and the operators that it runs."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

MODES = onnxruntime.GraphOptimizationLevel


def outputs_of(model: ir.Model, inputs: list[np.ndarray], *, fused: bool = False) -> list[np.ndarray]:
    """Results: each node computed as the file says it, or fused by ONNX Runtime."""
    return _run(model, inputs, fused)[0]


def operators_of(model: ir.Model, inputs: list[np.ndarray]) -> Counter:
    """How often ONNX Runtime runs each operator after its optimizations."""
    return _run(model, inputs, True)[1]


def _run(model: ir.Model, inputs: list[np.ndarray], fused: bool) -> tuple[list[np.ndarray], Counter]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = MODES.ORT_ENABLE_ALL if fused else MODES.ORT_DISABLE_ALL
    # Without it, sums of uint8 times int8 may saturate in 16 bits on a CPU without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        data = ir.serde.serialize_model(model).SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        feed = {value.name: array for value, array in zip(session.get_inputs(), inputs, strict=True)}
        results = session.run(None, feed)
        return results, Counter(node.op_type for node in onnx.load(path).graph.node)


def check(model: ir.Model) -> None:
    """ONNX's own checks: names, order, types and shapes."""
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


def operators_in(model: ir.Model) -> list[str]:
    """Operators of the file, in order; Q and DQ short."""
    short = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
    return [short.get(node.op_type, node.op_type) for node in model.graph]


def parsed(text: str, **constants: np.ndarray) -> ir.Model:
    """A model of ONNX's text form, where ``Q0(x)`` and ``DQ0(x)`` are on grid 0 of the constants s0 and z0."""
    graph = onnx.parser.parse_graph(text)
    for name, array in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
