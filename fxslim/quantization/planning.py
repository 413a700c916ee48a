# SPDX-License-Identifier: Apache-2.0
"""Decides which layers are quantized, on which grids, and where other quantizers go."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxslim.errors import ConfigError
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.layer_choice import Chosen
from fxslim.graph.recording import named_states, record
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.weight_users import find_users
from fxslim.nn import ActivationQuant, QuantConfig
from fxslim.nn.norm_folding import has_statistics
from fxslim.nn.quant_config import LEARNED_RANGES
from fxslim.quantization.dataflow import Dataflow
from fxslim.quantization.layer_configs import LayerConfigs, refuse
from fxslim.quantization.placement import Placement, place
from fxslim.quantization.quantizable_layers import QuantizableLayer, find_layers
from fxslim.quantization.quantization_plan import LayerPlan, QuantizationPlan
from fxslim.quantization.sums_read import find_sums
from fxslim.quantization.targets import Target, as_target

# From so many bits on, what a learned range of the model's input could gain is not worth its gradient.
_WIDE = 8


def plan_quantization(
    model: nn.Module,
    config: Any = "int8",
    *,
    target: str | Target = "onnxruntime",
    layers: Chosen | None = None,
    skip: Chosen = (),
    overrides: Mapping[str | type, Any] | None = None,
    first: Any = None,
    last: Any = None,
    fold_batch_norms: bool = False,
    freeze_after: int | None = None,
    example_inputs: Any = None,
    reached_only: bool = False,
) -> QuantizationPlan:
    """Decide what is quantized, and where; the model is not touched (docs/quantization.md).

    ``config``: a ``QuantConfig``, a name such as "int8" or "w4a8", a dict of AMCT's or NNI's, or a list of NNI's
    entries. ``target``: onnxruntime, tensorrt, openvino or ascend; it decides the grids of activations. ``overrides``:
    {layer: config, or "float"}; ``first``, ``last``: the same for the first and the last layer.
    ``fold_batch_norms``: weights are quantized as they will be with the norm behind them folded in, and norms freeze
    after ``freeze_after`` batches. With ``example_inputs`` sums, pools and outputs get the quantizers that the target
    computes with; without, each layer quantizes its own input. ``reached_only`` leaves layers in float that they don't
    reach.
    """
    refuse_wrapped(model)
    wishes = LayerConfigs(
        config=config, layers=layers, skip=skip, overrides=overrides or {}, first=first, last=last,
        target=as_target(target),
    )  # fmt: skip
    examples = () if example_inputs is None else tuple(as_inputs(example_inputs))
    _check_folding(fold_batch_norms, freeze_after, examples)
    return _planned(without_compile_wrapper(model), wishes, examples, fold_batch_norms, freeze_after, reached_only)


def _planned(
    model: nn.Module,
    wishes: LayerConfigs,
    examples: tuple[Inputs, ...],
    fold: bool,
    freeze_after: int | None,
    reached_only: bool,
) -> QuantizationPlan:
    flows = [Dataflow(record(model, example)) for example in examples]
    found = find_layers(model, find_users(model, examples, None))
    names = {one.name for one in found}
    order = [call.name for flow in flows[:1] for call in flow.recording.calls if call.name in names]
    configs = wishes.of(model, found, order)
    kept, notes = _possible(found, configs, flows, named=wishes.layers is not None, reached_only=reached_only)
    if not kept:
        raise ConfigError("no layer is left to quantize" + "".join(f"\n  {note}" for note in notes))
    # Norms that are not folded now will be in deployment.
    norms = _norms_behind(model, flows[0], kept, configs) if flows else {}
    folds = {name: norm for name, norm in norms.items() if fold and _is_convolution(kept[name])}
    placed = _Placed(kept, {name: configs[name] for name in kept})
    if flows and placed.general is not None:
        unasked = {name: own.activation is None for name, own in placed.configs.items()}
        placed.take(place(flows[0], unasked, wishes.target))
    asked = [name for name, own in placed.configs.items() if own.activation is not None and kept[name].user is None]
    with_output = [name for name, config in placed.configs.items() if config.output is not None]
    return QuantizationPlan(
        layers=tuple(
            LayerPlan(name=name, config=own, user=kept[name].user, is_given=name in placed.given)
            for name, own in placed.configs.items()
        ),
        outputs=placed.outputs,
        shapes={name: tuple(state.shape) for name, state in named_states(model)},
        target=wishes.target.name,
        folds=folds,
        norms=norms,
        sources={name: giver for name, giver in placed.given.items() if giver is not None},
        sums=find_sums(flows[0], placed.configs, norms, asked, placed.outputs, with_output) if flows else {},
        freeze_after=freeze_after,
        start_step=max(own.start_step for own in placed.configs.values()),
        notes=(*notes, *placed.notes),
        inputs=examples,
    )


def prepare_qat(
    model: nn.Module, config: Any = "int8", *, optimizer: Optimizer | None = None, **wishes: Any
) -> nn.Module:
    """``plan_quantization(model, config, ...)`` and ``apply`` in one, in place; returns the model, ready to train.

    >>> net = prepare_qat(nn.Sequential(nn.Linear(8, 16)), "w4a8")
    >>> net[0].weight_quantizer
    ArqWeights(4 bit, per channel)
    """
    return plan_quantization(model, config, **wishes).apply(model, optimizer=optimizer)


def _check_folding(wanted: bool, freeze_after: int | None, examples: tuple[Inputs, ...]) -> None:
    if freeze_after is not None and (not wanted or isinstance(freeze_after, bool) or freeze_after < 0):
        raise ConfigError(f"freeze_after={freeze_after} is a number of batches, and needs fold_batch_norms=True")
    if wanted and not examples:
        raise ConfigError("fold_batch_norms=True needs example_inputs=: a forward tells the norm behind each layer")


def _norms_behind(
    model: nn.Module, flow: Dataflow, kept: Mapping[str, QuantizableLayer], configs: dict[str, QuantConfig]
) -> dict[str, str]:
    """{layer: the batch norm behind it}; grids of their weights get two equal sides: a factor may be negative."""
    found = {}
    for call in flow.recording.calls:
        norm = flow.norm_behind(call) if call.name in kept else None
        config = configs.get(call.name)
        if norm is None or config is None or config.weight is None:
            continue
        if isinstance(kept[call.name].module, nn.MultiheadAttention) or not has_statistics(model.get_submodule(norm)):
            continue
        found[call.name] = norm
        if config.weight.method in ("arq", "lsq") and config.weight.format == "int":
            configs[call.name] = replace(config, weight=replace(config.weight, narrow=True))
    return found


def _is_convolution(layer: QuantizableLayer) -> bool:
    return isinstance(layer.module, nn.modules.conv._ConvNd)


def _lower_end(config: ActivationQuant, above: bool) -> ActivationQuant:
    """0 as the lower end of what is never negative; symmetric grids have none to choose.

    PACT cuts off what is below 0, so it is for such tensors only: others learn both clips.
    """
    if config.method == "pact" and not above:
        return replace(config, method="ulq")
    return replace(config, fixed_min=True) if above and not config.symmetric and config.clip_min is None else config


def _of_data(config: ActivationQuant) -> ActivationQuant:
    """The range of the model's own input is followed, not learned, from 8 bits on.

    A learned one needs the gradient of the first layer's input, which training in float never computes.
    """
    learned = config.method in LEARNED_RANGES and config.bits >= _WIDE and config.clip_max is None
    return replace(config, method="min_max") if learned else config


def _possible(
    found: list[QuantizableLayer],
    configs: Mapping[str, QuantConfig],
    flows: list[Dataflow],
    named: bool,
    reached_only: bool,
) -> tuple[dict[str, QuantizableLayer], list[str]]:
    """Layers without an obstacle, and notes on the others; those that the user named are errors."""
    kept, notes = {}, []
    for one in found:
        if one.name not in configs:
            continue
        calls = max((flow.calls_of.get(one.name, 0) for flow in flows), default=1)
        obstacle = one.obstacle
        if not obstacle and calls > 1:
            obstacle = f"it is called {calls} times in one forward, on tensors of different ranges"
        unreached = bool(flows) and not calls and one.user is None
        if not obstacle and unreached and reached_only:
            obstacle = "the example inputs do not reach it, and give it no range"
        if obstacle and named:
            refuse(one, obstacle)
        if obstacle:
            notes.append(f"{one.name or 'the model'} stays in float: {obstacle}")
            continue
        if unreached:
            notes.append(f"{one.name}: the example inputs do not reach it; it quantizes its own input")
        kept[one.name] = one
    return kept, notes


@dataclass
class _Placed:
    """Configs of layers as the placement changes them."""

    layers: Mapping[str, QuantizableLayer]
    configs: dict[str, QuantConfig]

    def __post_init__(self) -> None:
        self.outputs: dict[str, ActivationQuant] = {}
        self.given: dict[str, str | None] = {}
        self.notes: tuple[str, ...] = ()
        # What tensors that no layer of its own quantizes get.
        self.general = next((c.activation for c in self.configs.values() if c.activation is not None), None)

    def take(self, placement: Placement) -> None:
        """Layers whose input comes quantized do not quantize it again; outputs of layers are their own."""
        self.given = dict(placement.given)
        for name, config in self.configs.items():
            if config.activation is None or self.layers[name].user is not None:
                continue
            places = placement.inputs.get(name, {})
            above = bool(places) and all(places.values())
            activation = None if name in self.given else _lower_end(config.activation, above)
            if activation is not None and name in placement.data:
                activation = _of_data(activation)
            self.configs[name] = replace(config, activation=activation)
        for name, above in placement.outputs.items():
            config_of = self.configs.get(name)
            assert self.general is not None
            if config_of is None:
                self.outputs[name] = _lower_end(self.general, above)
            elif config_of.output is None:
                self.configs[name] = replace(config_of, output=_lower_end(self.general, above))
        self.notes = placement.notes
