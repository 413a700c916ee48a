# SPDX-License-Identifier: Apache-2.0
"""Runs ONNX graphs as they are written: no operator is fused, so that nothing but the graph is tested."""

from collections import Counter
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn


def exported(model: nn.Module, *inputs: Tensor, **settings: Any) -> onnx.ModelProto:
    """By torch's own exporter, called as its users call it."""
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **settings)
    assert program is not None
    return program.model_proto


def session(model: onnx.ModelProto | str, plain: bool = True) -> onnxruntime.InferenceSession:
    """Of a file or a graph; ``plain``: without ONNX Runtime's optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | str, *inputs: Tensor, plain: bool = True) -> list[Tensor]:
    """All outputs."""
    one = session(model, plain)
    names = [given.name for given in one.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return [torch.from_numpy(value) for value in one.run(None, feed)]


def operators(model: onnx.ModelProto | str) -> Counter[str]:
    """How many there are of each kind."""
    graph = (onnx.load(model) if isinstance(model, str) else model).graph
    return Counter(node.op_type for node in graph.node)
