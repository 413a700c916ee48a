# SPDX-License-Identifier: Apache-2.0
"""From a torch model to an ONNX graph, and from there to a file."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxslim.errors import ConfigError, ExportError
from fxslim.export.onnx_packages import onnx_package
from fxslim.graph.inputs import Inputs

# A file holds up to 2 GB, its weights included.
_MOST_BYTES = (1 << 31) - (1 << 26)
_LEAST_OPSET = 18


def onnx_model(
    model: nn.Module,
    inputs: Inputs,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_shapes: Any,
    opset: int | None,
) -> Any:
    """An ``onnx_ir.Model`` of what the model does with these inputs."""
    for package in ("onnx", "onnxscript"):
        onnx_package(package)
    if opset is not None and opset < _LEAST_OPSET:
        raise ExportError(f"opset={opset} is below {_LEAST_OPSET}, the least that torch's exporter writes")
    _check_names(input_names, output_names)
    said, inputs = io.StringIO(), inputs.with_tensors(torch.Tensor.contiguous)
    try:
        with contextlib.redirect_stdout(said), torch.no_grad():
            program = torch.onnx.export(
                model,
                tuple(inputs.args),
                kwargs=dict(inputs.kwargs),
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise _explained(error, inputs, dynamic_shapes) from error
    assert program is not None
    graph = program.model.graph
    _check_count("input_names", input_names, len(graph.inputs))
    _check_count("output_names", output_names, len(graph.outputs))
    _drop_origins(program.model)
    if output_names is None:
        _name_outputs(program.model.graph)
    return program.model


def _check_names(input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> None:
    for argument, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise ConfigError(f"{argument}={names!r} is one string: give a list of names, [{names!r}]")
    names = [*(input_names or ()), *(output_names or ())]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]!r} is twice among input_names and output_names: tensors of a file differ in name")


def _check_count(argument: str, names: Sequence[str] | None, wanted: int) -> None:
    if names and len(names) != wanted:
        kind = argument.partition("_")[0]
        raise ConfigError(
            f"{argument} has {len(names)} names ({', '.join(names)}), the model {wanted} {kind}s: give one for each"
        )


def _drop_origins(model: Any) -> None:
    """Leave out what the exporter notes of where each node comes from.

    Stack traces with the folders and source lines of this machine: not what one gives away with a model, and in a small
    one as large as its integer weights.
    """
    ir = onnx_package("onnx_ir")
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _name_outputs(graph: Any) -> None:
    """Names of their own for outputs that a quantizer gives, which have none that would say anything."""
    for number, output in enumerate(graph.outputs):
        if output.name is None or output.name.startswith("_symbolic"):
            output.name = "output" if len(graph.outputs) == 1 else f"output_{number}"


def _explained(error: Exception, inputs: Inputs, dynamic_shapes: Any) -> Exception:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{type(cause).__name__}: {str(cause).strip()}"
    if "dynamic_shapes" in text:
        return ConfigError(f"dynamic_shapes={dynamic_shapes!r} does not fit {inputs}: {text}")
    return ExportError(
        f"torch.onnx.export can't write the model with {inputs}: {text}\n"
        "Look for the layer in torch.export.export(model, ...), whose error names it; rewrite what torch.export can't "
        "follow, or export the part of the model that it can"
    )


def save_onnx(model: Any, path: Path) -> None:
    """Write to a file; weights go to ``<name>.data`` beside it only where one file can't hold them."""
    ir = onnx_package("onnx_ir")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, str(path), external_data=None if size < _MOST_BYTES else path.name + ".data")
