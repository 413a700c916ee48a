# SPDX-License-Identifier: Apache-2.0
"""Turns layers of a model into their QAT counterparts, in place, and adds quantizers at the edges of others."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxslim.errors import PlanError
from fxslim.graph.surgery.changes import Changes
from fxslim.nn import ActivationQuant, HandedOverLinearQAT, MultiheadAttentionQAT, QuantizedLayer
from fxslim.nn.bias_grids import Neighbours
from fxslim.nn.handed_over_quantized import quantize_inputs_within
from fxslim.nn.norm_folding import freeze_later
from fxslim.nn.placed_quantizers import OUTPUT_QUANTIZER, place_output_quantizer
from fxslim.nn.quantizers import Phased
from fxslim.quantization.quantizable_layers import COUNTERPARTS
from fxslim.quantization.sums_read import Sums


def quantize_layers(model: nn.Module, plans: Iterable[Any], changes: Changes) -> None:
    """Each planned layer becomes its counterpart; the caller restores buffers, attributes and hooks."""
    owners = []
    for plan in plans:
        module: Any = model.get_submodule(plan.name)
        if type(module) not in COUNTERPARTS:
            raise PlanError(f"{plan.name or 'the model'} is a {type(module).__name__}, which can't be quantized")
        remember_states(module, changes)
        for child in module.children():
            remember_states(child, changes)
        counterpart = COUNTERPARTS[type(module)] if plan.user is None else HandedOverLinearQAT
        plain = type(module)
        changes.set_attribute(module, "__class__", counterpart)
        if plain not in (counterpart.float_class, counterpart.masked_class):
            module.float_class = plain
        module.start_quantizing(plan.config)
        _name(module, plan.name)
        if plan.user is not None:
            owners.append(plan.user)
    for owner in dict.fromkeys(owners):
        quantize_inputs_within(model.get_submodule(owner))


def _name(module: QuantizedLayer, name: str) -> None:
    for path, part in module.named_modules():
        if isinstance(part, QuantizedLayer):
            part.name_quantizers(".".join(filter(None, (name, path))) or "the model")


def quantize_outputs(
    model: nn.Module, outputs: Mapping[str, ActivationQuant], start_step: int, changes: Changes
) -> None:
    """Quantizers of what these modules give."""
    for name, config in outputs.items():
        module = model.get_submodule(name)
        remember_states(module, changes)
        place_output_quantizer(module, config, start_step, name or "the model")


def fold_norms(model: nn.Module, folds: Mapping[str, str], freeze_after: int | None, changes: Changes) -> None:
    """Convolutions that quantize their weight as it will be when the norm behind them is folded in."""
    for name, norm_name in folds.items():
        layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
        if not isinstance(layer, QuantizedLayer):
            raise PlanError(f"{name} is a {type(layer).__name__}, into which {norm_name} can't be folded")
        layer.fold(norm)
        if freeze_after is not None:
            remember_states(norm, changes)
            freeze_later(norm, freeze_after)


def introduce_neighbours(
    model: nn.Module,
    norms: Mapping[str, str],
    sources: Mapping[str, str],
    sums: Mapping[str, Sums],
) -> None:
    """Layers get to know the norms behind them, the quantizer that their input comes from, and who reads their sums."""
    readers: dict[str, list[Any]] = {}
    for reader, given in sums.items():
        module = model.get_submodule(reader)
        quantizer = module._modules.get("input_quantizer" if isinstance(module, QuantizedLayer) else OUTPUT_QUANTIZER)
        for name, channels in given if quantizer is not None else ():
            readers.setdefault(name, []).append((quantizer, channels))
    for name in dict.fromkeys((*norms, *sources, *readers)):
        layer = model.get_submodule(name)
        if isinstance(layer, QuantizedLayer):
            norm = model.get_submodule(norms[name]) if name in norms else None
            source = _quantizer_of(model.get_submodule(sources[name])) if name in sources else None
            layer.stand_between(Neighbours(norm, source, tuple(readers.get(name, ()))))


def _quantizer_of(giver: nn.Module) -> nn.Module | None:
    """Of what a module gives; that of attention belongs to its last projection."""
    last = giver.out_proj if isinstance(giver, MultiheadAttentionQAT) else giver
    return last._modules.get(OUTPUT_QUANTIZER)


def remember_states(module: nn.Module, changes: Changes) -> None:
    """Parameters and submodules as they are, for taking back."""
    for kept in (module._parameters, module._modules):
        changes.on_undo(functools.partial(_refill, kept, dict(kept)))


def _refill(kept: Any, before: Mapping[str, Any]) -> None:
    kept.clear()
    kept.update(before)


def add_to_optimizer(optimizer: Optimizer | None, parameters: list[nn.Parameter], changes: Changes) -> None:
    """What quantizers learn trains along, without weight decay."""
    if optimizer is None or not parameters:
        return
    groups = optimizer.param_groups
    group: dict[str, Any] = {"params": parameters}
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = 0.0
    changes.on_undo(functools.partial(_shorten, groups, len(groups)))
    optimizer.add_param_group(group)


def _shorten(groups: list[Any], length: int) -> None:
    del groups[length:]


def quantizers_of(model: nn.Module) -> dict[str, Phased]:
    """All quantizers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Phased)}
