# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU with one thread: sessions, and the operators that it runs after its own optimizations."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime import GraphOptimizationLevel

# What multiplies and adds in float: an integer file has none of these left.
FLOAT = frozenset(
    """
    Conv FusedConv NhwcFusedConv ConvTranspose Gemm FusedGemm MatMul FusedMatMul Add BatchNormalization
    """.split()
)
# Operators with such names compute in integers.
_INTEGER_STARTS = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "ConvInteger", "DynamicQuantize")


def session(path: Path, *, exact: bool = False, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """``exact``: operators one by one, in float between Q and DQ, where no sum of products can saturate."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def operators(path: Path) -> Counter[str]:
    """How often ONNX Runtime runs each operator."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
        return Counter(node.op_type for node in graph.node)


def in_float(found: Counter[str]) -> str:
    """Those that still multiply and add in float, as "2 Conv, 1 Add"; "none"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(found.items()) if name in FLOAT) or "none"


def in_integers(found: Counter[str]) -> int:
    """How many compute in integers."""
    return sum(number for name, number in found.items() if name.startswith(_INTEGER_STARTS))
