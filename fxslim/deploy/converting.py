# SPDX-License-Identifier: Apache-2.0
"""Decides how a quantized or sparse model is deployed, and does it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fxslim.deploy.convert_plan import ConvertPlan
from fxslim.deploy.folded_norms import find_norms
from fxslim.deploy.fused_relus import find_relus
from fxslim.deploy.given_grids import find_given
from fxslim.deploy.layer_conversion import BLOCKS, DENSE, Blocks, LayerConversion
from fxslim.deploy.readiness import refuse_unready
from fxslim.deploy.sparse_choice import SparseChoice, choose_sparse
from fxslim.errors import ConfigError, UnsupportedLayerError
from fxslim.graph.inputs import as_inputs
from fxslim.graph.recording import named_states, record
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.nn import MultiheadAttentionQAT, QuantizedLayer
from fxslim.nn.deployed_layers import size_bytes
from fxslim.patterns import NM, Block
from fxslim.plan.applied_plans import applied
from fxslim.quantization import QuantizationPlan
from fxslim.quantization.dataflow import Dataflow


def plan_convert(model: nn.Module, *, example_inputs: Any = None, sparse: bool | str = "auto") -> ConvertPlan:
    """Decide how each quantized or sparse layer is deployed; the model is not touched (docs/deploy.md).

    With ``example_inputs`` the model is run once: batch norms behind convolutions are folded into them, ReLUs become
    part of block-sparse layers, and layers whose input another module quantizes learn its grid. Without, only what the
    quantization's own plan says is folded, and such layers compute in float.

    ``sparse``: layers with zero blocks skip them where that is faster ("auto"), everywhere (True), or nowhere (False).
    """
    refuse_wrapped(model)
    model = without_compile_wrapper(model)
    layers = layers_to_deploy(model)
    examples = () if example_inputs is None else tuple(as_inputs(example_inputs))
    choices = choose_sparse(model, examples, sparse)
    if not layers and not choices:
        raise ConfigError(
            "no layer of this model is quantized, and none has zero blocks: prepare_qat(model) or quantize(model) "
            "first for small integers, sparsify(model, 'cin32cout64') for layers that skip zeros"
        )
    refuse_unready(model)
    flows = [Dataflow(record(model, example)) for example in examples]
    norms = find_norms(model, _computing(model, layers, choices), flows)
    given = find_given(model, layers, flows)
    planned, notes = _planned(model, layers, choices, norms, given)
    planned, relus = _with_relus(model, planned, flows)
    return ConvertPlan(
        layers=tuple(planned),
        shapes={name: tuple(state.shape) for name, state in named_states(model)},
        relus=relus,
        notes=(*notes, *_notes_of_choices(choices)),
        inputs=examples,
    )


def convert(model: nn.Module, *, example_inputs: Any = None, sparse: bool | str = "auto") -> nn.Module:
    """Turn a quantized or sparse model into a deployable one, in place; returns the model.

    Weights are stored as small integers, and without their zero blocks; layers compute with them in integers where
    there are kernels for that, else in float. ``plan_convert`` tells beforehand which does what, and what ``sparse``
    means. After any error the model is as it was.

    >>> import torch, fxslim
    >>> net = fxslim.quantize(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), "int8", data=[torch.randn(4, 8)])
    >>> convert(net)[0].weight
    SmallWeight((4, 8), int8)
    >>> net = fxslim.sparsify(nn.Sequential(nn.Linear(128, 64)), "cin32cout64", ratio=0.5)
    >>> convert(net)[0].weight
    PackedBlocks((64, 128), 2 of 4 blocks, cin32cout64)
    """
    plan_convert(model, example_inputs=example_inputs, sparse=sparse).apply(model)
    return model


def _computing(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], choices: Mapping[str, SparseChoice]
) -> dict[str, nn.Module]:
    """The layers whose arithmetic can take up a norm."""
    blocks = {name: model.get_submodule(name) for name, choice in choices.items() if choice.form == BLOCKS}
    return {**layers, **blocks}


def _planned(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    choices: Mapping[str, SparseChoice],
    norms: Mapping[str, str],
    given: Mapping[str, str],
) -> tuple[list[LayerConversion], list[str]]:
    """In the order of the model; with notes."""
    planned, notes = [], []
    for name, _ in model.named_modules():
        quantized = layers.get(name)
        choice = choices.get(name)
        if quantized is None and (choice is None or isinstance(model.get_submodule(name), QuantizedLayer)):
            continue
        if quantized is None and choice is not None:
            planned.append(_sparse(model, name, choice, norms.get(name), None))
            continue
        assert quantized is not None
        plan = _quantized(model, name, quantized, choice, norms.get(name), given.get(name))
        if isinstance(plan, str):
            notes.append(plan)
            continue
        planned.append(plan)
        if plan.kernel.startswith("float") and not plan.given and name in _taking_given(model):
            notes.append(f"{name} computes in float: which grid its input is on is not known; give example_inputs=")
    return planned, notes


def _with_relus(
    model: nn.Module, planned: list[LayerConversion], flows: list[Dataflow]
) -> tuple[list[LayerConversion], tuple[str, ...]]:
    """With the ReLUs that become part of block-sparse layers, and the modules that then have nothing to do."""
    able = [
        one.name
        for one in planned
        if one.blocks is not None and getattr(model.get_submodule(one.name), "output_quantizer", None) is None
    ]
    norms = {one.name: one.norm for one in planned if one.norm is not None}
    fused, idle = find_relus(model, able, norms, flows)
    return [
        replace(one, blocks=replace(one.blocks, relu=True)) if one.blocks and one.name in fused else one
        for one in planned
    ], idle


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


def _quantized(
    model: nn.Module, name: str, layer: QuantizedLayer, choice: SparseChoice | None, norm: str | None, given: str | None
) -> LayerConversion | str:
    """What becomes of a quantized layer; or a note that tells why it stays."""
    why = "" if choice is None else choice.why
    if choice is not None and choice.form == BLOCKS:
        try:
            return _sparse(model, name, choice, norm, given)
        except UnsupportedLayerError:
            why = "integers that skip zeros need inputs and weights of at most 8 bits"
    plan = LayerConversion(name=name, norm=norm, given=given, kernel="", bytes_before=0, bytes_after=0)
    try:
        done = _sized(model, plan)
    except UnsupportedLayerError as error:
        return f"{name or 'the model'}: {error}"
    masked = why and choice is not None and isinstance(choice.pattern, Block)
    return replace(done, kernel=f"{done.kernel}, dense: {why}") if masked else done


def _sparse(model: nn.Module, name: str, choice: SparseChoice, norm: str | None, given: str | None) -> LayerConversion:
    """What becomes of a layer with zeros."""
    pattern = choice.pattern
    blocks = Blocks(cin=pattern.cin, cout=pattern.cout, num_blocks=0) if isinstance(pattern, Block) else None
    plan = LayerConversion(
        name=name, norm=norm, given=given, kernel=f"dense: {choice.why}", bytes_before=0, bytes_after=0,
        form=choice.form, blocks=blocks if choice.form == BLOCKS else None,
    )  # fmt: skip
    return _sized(model, plan)


def _sized(model: nn.Module, plan: LayerConversion) -> LayerConversion:
    """With the kernel and the sizes of what is made."""
    layer, made = plan.made(model, values=True)
    before = size_bytes(layer) + (0 if plan.norm is None else size_bytes(model.get_submodule(plan.norm)))
    if made is None:
        return replace(plan, bytes_before=before, bytes_after=sum(map(_bytes_of, layer.parameters())))
    return replace(plan.with_blocks_of(made), kernel=_kernel(made), bytes_before=before, bytes_after=size_bytes(made))


def _kernel(deployed: Any) -> str:
    layers = [deployed] if hasattr(deployed, "kernel") else [deployed.q_proj, deployed.k_proj, deployed.v_proj]
    return ", ".join(dict.fromkeys(layer.kernel for layer in layers))


def _notes_of_choices(choices: Mapping[str, SparseChoice]) -> list[str]:
    count = sum(choice.form == DENSE and choice.pattern == NM(2, 4) for choice in choices.values())
    if not count:
        return []
    return [
        f"{count} layers with a 2:4 mask become dense ones with zeros: it brings speed on NVIDIA GPUs only, to linear "
        "layers in float16 and bfloat16 (move the model there first); on CPUs whole blocks do ('cin32cout64')"
    ]


def _taking_given(model: nn.Module) -> set[str]:
    plans = [plan for plan in applied(model) if isinstance(plan, QuantizationPlan)]
    return {one.name for plan in plans for one in plan.layers if one.is_given}


def _bytes_of(state: Tensor) -> int:
    return state.numel() * state.element_size()
