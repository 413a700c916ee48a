# SPDX-License-Identifier: Apache-2.0
"""A copy of a quantized model as it is written to a file: grids fixed, weights as integers, batch norms folded."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import ExportError
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import record
from fxslim.nn import MultiheadAttentionQAT, QuantizedLayer
from fxslim.nn.bias_grids import deployed_bias, forget_neighbours
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.norm_folding import folded_norm, has_statistics
from fxslim.nn.qat_attention import projection_bias
from fxslim.nn.quantized_layers import stored_weight
from fxslim.nn.quantizers import ActivationQuantizer, WeightQuantizer
from fxslim.nn.quantizers.fixed_quantizers import fixed_quantizer
from fxslim.nn.quantizers.stored_weights import StoredWeight
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
    flow = Dataflow(record(result, inputs))
    norms = _norms_behind(result, flow) if fold_norms else {}
    _store_weights(result)
    _store_biases(result, norms, flow)
    for name, norm in norms.items():
        _fold(result, name, norm)
    for module in list(result.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ActivationQuantizer):
                module._modules[name] = fixed_quantizer(child) if child.enabled else nn.Identity()
    # A file knows no memory formats: torch's exporter spells out what channels_last means for a view.
    return result.to(memory_format=torch.contiguous_format)


def _norms_behind(model: nn.Module, flow: Dataflow) -> dict[str, str]:
    """{quantized layer: the batch norm that alone reads what it gives}."""
    found = {}
    for call in flow.recording.calls:
        layer = model.get_submodule(call.name)
        if isinstance(layer, QuantizedLayer) and layer.output_quantizer is None and layer.maskable == ("weight",):
            norm = flow.norm_behind(call)
            if norm is not None and has_statistics(model.get_submodule(norm)):
                found[call.name] = norm
    return found


def _store_weights(model: nn.Module) -> None:
    for layer in model.modules():
        for name, quantizer in list(layer._modules.items()):
            if isinstance(quantizer, WeightQuantizer) and isinstance(layer, QuantizedLayer):
                layer._modules[name] = stored_weight(layer, name.removesuffix("_quantizer"))


def _store_biases(model: nn.Module, norms: Mapping[str, str], flow: Dataflow) -> None:
    """Biases as the model adds them in eval mode, those of norms folded in."""
    given = {call.name: call.inputs[:3] for call in flow.recording.calls}
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        scales = _scales(layer)
        if isinstance(layer, MultiheadAttentionQAT):
            inputs = given.get(name, ())
            same = [inputs.index(node) for node in inputs] if len(inputs) == 3 else [0, 0, 0]
            if layer.in_proj_bias is not None and scales:
                layer._parameters["in_proj_bias"] = _kept(projection_bias(layer, scales, same))
        elif "bias" in layer._parameters:
            norm = model.get_submodule(norms[name]) if name in norms else None
            layer._parameters["bias"] = _kept(deployed_bias(layer, scales[0] if scales else None, norm))
        forget_neighbours(layer)


def _scales(layer: QuantizedLayer) -> list[Tensor]:
    """Of all weights of a layer; none where integer kernels do not multiply them."""
    if not layer.rounds_biases:
        return []
    stored = [layer._modules.get(f"{name}_quantizer") for name in layer.maskable]
    found = [one.scale_of_outputs for one in stored if isinstance(one, StoredWeight)]
    scales = [scale for scale in found if scale is not None]
    return scales if len(scales) == len(stored) else []


def _kept(bias: Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias, requires_grad=False)


def _fold(model: nn.Module, name: str, norm_name: str) -> None:
    layer: Any = model.get_submodule(name)
    norm: Any = model.get_submodule(norm_name)
    factors, dtype = folded_norm(norm)[0], layer.stored().dtype
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
