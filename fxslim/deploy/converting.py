# SPDX-License-Identifier: Apache-2.0
"""Decides how a quantized model is deployed, and does it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxslim.deploy.convert_plan import ConvertPlan, LayerConversion
from fxslim.deploy.readiness import refuse_unready
from fxslim.errors import ConfigError, UnsupportedLayerError
from fxslim.graph.inputs import as_inputs
from fxslim.graph.recording import named_states, record
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.nn import HandedOverLinearQAT, MultiheadAttentionQAT, QuantizedLayer
from fxslim.nn.deployed_layers import size_bytes
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.plan.applied_plans import applied
from fxslim.quantization import QuantizationPlan
from fxslim.quantization.dataflow import Dataflow, operator_of

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def plan_convert(model: nn.Module, *, example_inputs: Any = None) -> ConvertPlan:
    """Decide how each quantized layer is deployed; the model is not touched (docs/deploy.md).

    With ``example_inputs`` the model is run once: batch norms behind convolutions are folded into them, and layers
    whose input another module quantizes learn its grid. Without, only what the quantization's own plan says is folded,
    and such layers compute in float.
    """
    refuse_wrapped(model)
    model = without_compile_wrapper(model)
    layers = layers_to_deploy(model)
    if not layers:
        raise ConfigError("no layer of this model is quantized: prepare_qat(model) or quantize(model) first")
    refuse_unready(model)
    examples = () if example_inputs is None else tuple(as_inputs(example_inputs))
    flows = [Dataflow(record(model, example)) for example in examples]
    norms = _norms(model, layers, flows)
    given = _given(model, layers, flows)
    plans, notes = [], []
    for name, layer in layers.items():
        plan = _conversion(model, name, layer, norms.get(name), given.get(name))
        if isinstance(plan, str):
            notes.append(plan)
            continue
        plans.append(plan)
        if plan.kernel == "float" and not plan.given and name in _taking_given(model):
            notes.append(f"{name} computes in float: which grid its input is on is not known; give example_inputs=")
    return ConvertPlan(
        layers=tuple(plans),
        shapes={name: tuple(state.shape) for name, state in named_states(model)},
        notes=tuple(notes),
        inputs=examples,
    )


def convert(model: nn.Module, *, example_inputs: Any = None) -> nn.Module:
    """Turn a quantized model into a deployable one, in place; returns the model.

    Weights are stored as small integers; layers compute with them in integers where torch has kernels for that, else
    in float. ``plan_convert`` tells beforehand which does what. After any error the model is as it was.

    >>> import torch, fxslim
    >>> net = fxslim.quantize(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), "int8", data=[torch.randn(4, 8)])
    >>> convert(net)[0].weight
    SmallWeight((4, 8), int8)
    """
    plan_convert(model, example_inputs=example_inputs).apply(model)
    return model


def layers_to_deploy(model: nn.Module) -> dict[str, QuantizedLayer]:
    """By name, without the layers inside of attention, which belong to it."""
    inside: set[int] = set()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and id(module) not in inside:
            found[name] = module
        if isinstance(module, MultiheadAttentionQAT):
            inside |= {id(child) for child in module.modules()}
    return found


def _conversion(
    model: nn.Module, name: str, layer: QuantizedLayer, norm: str | None, given: str | None
) -> LayerConversion | str:
    """What becomes of a layer; or a note that tells why it stays."""
    norm_module: Any = None if norm is None else model.get_submodule(norm)
    source: Any = None if given is None else model.get_submodule(given)
    try:
        deployed = layer.deployed(norm_module, source)
    except UnsupportedLayerError as error:
        return f"{name or 'the model'}: {error}"
    before = size_bytes(layer) + (0 if norm_module is None else size_bytes(norm_module))
    return LayerConversion(
        name=name, norm=norm, given=given, kernel=_kernel(deployed), bytes_before=before,
        bytes_after=size_bytes(deployed),
    )  # fmt: skip


def _kernel(deployed: Any) -> str:
    layers = [deployed] if hasattr(deployed, "kernel") else [deployed.q_proj, deployed.k_proj, deployed.v_proj]
    return ", ".join(dict.fromkeys(layer.kernel for layer in layers))


def _taking_given(model: nn.Module) -> set[str]:
    plans = [plan for plan in applied(model) if isinstance(plan, QuantizationPlan)]
    return {one.name for plan in plans for one in plan.layers if one.is_given}


def _norms(model: nn.Module, layers: Mapping[str, QuantizedLayer], flows: Iterable[Dataflow]) -> dict[str, str]:
    """{layer: the batch norm behind it that becomes part of it}."""
    found: dict[str, str] = {}
    for plan in applied(model):
        if isinstance(plan, QuantizationPlan):
            found |= plan.folds
    for number, flow in enumerate(flows):
        seen = {call.name: flow.norm_behind(call) for call in flow.recording.calls if call.name in layers}
        # What one forward does not show another may forbid.
        kept = {name: norm for name, norm in seen.items() if norm is not None}
        found = {**found, **kept} if number == 0 else {k: v for k, v in found.items() if seen.get(k, v) == v}
    return {name: norm for name, norm in found.items() if name in layers and _can_fold(model, layers[name], norm)}


def _can_fold(model: nn.Module, layer: QuantizedLayer, norm: str) -> bool:
    module: Any = model.get_submodule(norm)
    return (
        isinstance(layer, nn.modules.conv._ConvNd)
        and type(module) in _NORMS
        and module.running_var is not None
        and layer.output_quantizer is None
    )


def _given(model: nn.Module, layers: Mapping[str, QuantizedLayer], flows: Iterable[Dataflow]) -> dict[str, str]:
    """{layer: the quantizer elsewhere that its inputs come from}."""
    found: dict[str, set[str | None]] = {}
    for flow in flows:
        made = {}
        for call in flow.recording.calls:
            if call.outputs and isinstance(model.get_submodule(call.name), ActivationQuantizer):
                made[flow.source(call.outputs[0])] = call.name
        for call in flow.recording.calls:
            layer = layers.get(call.name)
            if layer is not None and layer.input_quantizer is None and not isinstance(layer, HandedOverLinearQAT):
                number = len(layer.input_names)
                sources = {_quantizer_of(flow, node, made) for node in call.inputs[:number]}
                found.setdefault(call.name, set()).update(sources or {None})
    single = {name: next(iter(sources)) for name, sources in found.items() if len(sources) == 1}
    return {name: source for name, source in single.items() if source is not None}


def _quantizer_of(flow: Dataflow, node: Any, made: Mapping[Any, str]) -> str | None:
    """The quantizer that a tensor comes from by moves and clamps at 0, which leave values on its grid."""
    while True:
        node = flow.source(node)
        if node in made:
            return made[node]
        if operator_of(node) != "relu":
            return None
        node = node.args[0]
