# SPDX-License-Identifier: Apache-2.0
"""A copy of a quantized model as it is written to a file: grids fixed, weights as integers, batch norms folded."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import ExportError
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import record
from fxslim.nn import QuantizedLayer
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.quantized_layers import stored_weight
from fxslim.nn.quantizers import ActivationQuantizer, WeightQuantizer
from fxslim.nn.quantizers.fixed_quantizers import fixed_quantizer
from fxslim.patterns.weight_layout import layout_of
from fxslim.quantization.dataflow import Dataflow


@torch.inference_mode(False)
@torch.no_grad()
def deployed_copy(model: nn.Module, inputs: Inputs, fold_norms: bool = True) -> nn.Module:
    """In eval mode. Computes what the model does, rounding of the folded batch norms aside."""
    try:
        result = copy.deepcopy(model).eval()
    except Exception as error:
        raise ExportError(
            f"the model can't be copied ({type(error).__name__}: {error}): what it holds besides layers must survive "
            "copy.deepcopy"
        ) from error
    norms = _norms_behind(result, inputs) if fold_norms else {}
    _store_weights(result)
    for name, norm in norms.items():
        _fold(result, name, norm)
    for module in list(result.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ActivationQuantizer):
                module._modules[name] = fixed_quantizer(child) if child.enabled else nn.Identity()
    return result


def _norms_behind(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """{quantized layer: the batch norm that alone reads what it gives}."""
    flow = Dataflow(record(model, inputs))
    found = {}
    for call in flow.recording.calls:
        layer = model.get_submodule(call.name)
        if isinstance(layer, QuantizedLayer) and layer.output_quantizer is None and layer.maskable == ("weight",):
            norm = flow.norm_behind(call)
            if norm is not None and _has_statistics(model.get_submodule(norm)):
                found[call.name] = norm
    return found


def _has_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None


def _store_weights(model: nn.Module) -> None:
    for layer in model.modules():
        for name, quantizer in list(layer._modules.items()):
            if isinstance(quantizer, WeightQuantizer) and isinstance(layer, QuantizedLayer):
                layer._modules[name] = stored_weight(layer, name.removesuffix("_quantizer"))


def _fold(model: nn.Module, name: str, norm_name: str) -> None:
    layer: Any = model.get_submodule(name)
    norm: Any = model.get_submodule(norm_name)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    factors = torch.rsqrt(variance + norm.eps) * (1.0 if norm.weight is None else norm.weight.double())
    shift = 0.0 if norm.bias is None else norm.bias.double()
    bias = (0.0 if layer.bias is None else layer.bias.double()) * factors + shift - mean * factors
    dtype = layer.stored().dtype
    layer._parameters["bias"] = nn.Parameter(bias.to(dtype), requires_grad=False)
    quantizer = layer._modules.get("weight_quantizer")
    if quantizer is None:
        _multiply(layer, factors.to(dtype))
    else:
        quantizer.multiply_outputs(factors)
    layer.__dict__.pop("_folded", None)
    # What hangs on the norm, such as a quantizer of its output, stays.
    identity = copied_as(norm, nn.Identity)
    identity._parameters.clear()
    identity._buffers.clear()
    parent, _, own = norm_name.rpartition(".")
    model.get_submodule(parent)._modules[own] = identity


def _multiply(layer: Any, factors: Tensor) -> None:
    layout, weight = layout_of(layer), layer.masked()
    rows = layout.rows(weight) * factors.reshape(-1, *[1] * (weight.dim() - 1))
    layer._parameters["weight"] = nn.Parameter(layout.restored(rows), requires_grad=False)
