# SPDX-License-Identifier: Apache-2.0
"""Turns a model's layers into their masked counterparts and back, in place."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxslim.errors import PlanError
from fxslim.graph.surgery.changes import Changes
from fxslim.nn import MaskedMultiheadAttention, MaskedWeights, MaskSettings
from fxslim.nn.masked_weights import strip_masks
from fxslim.patterns import PatternCheck, check
from fxslim.patterns.weight_layout import layout_of
from fxslim.plan.applied_plans import applied
from fxslim.sparsity.maskable_weights import COUNTERPARTS


def put_masks_on(model: nn.Module, settings: Mapping[str, MaskSettings], changes: Changes) -> None:
    """Give these weights masks that keep everything so far; the caller restores buffers, attributes and hooks."""
    of_layer: dict[str, dict[str, MaskSettings]] = {}
    for name, setting in settings.items():
        layer, _, attribute = name.rpartition(".")
        of_layer.setdefault(layer, {})[attribute] = setting
    for layer, wanted in of_layer.items():
        _mask_layer(model, layer, wanted, changes)
    _refuse_bypasses(model, changes)


def _mask_layer(model: nn.Module, layer: str, wanted: Mapping[str, MaskSettings], changes: Changes) -> None:
    module: Any = model.get_submodule(layer)
    if type(module) not in COUNTERPARTS:
        raise PlanError(f"{layer or 'the model'} is a {type(module).__name__}, which has no masked counterpart")
    kinds = {dataclasses.replace(setting) for setting in wanted.values()}
    if len(kinds) > 1:
        raise PlanError(f"{layer}: its weights {sorted(wanted)} share one layer and need one pattern, got {kinds}")
    parent: Any = model.get_submodule(layer.rpartition(".")[0]) if layer else model
    setting = next(iter(kinds))
    if type(parent) is nn.MultiheadAttention and layer.endswith("out_proj"):
        # Its own forward is never called: the owner puts the mask on.
        changes.set_attribute(parent, "__class__", MaskedMultiheadAttention)
        owner: Any = parent
        owner.start_masking(setting, ())
    plain = type(module)
    changes.set_attribute(module, "__class__", COUNTERPARTS[plain])
    module.start_masking(setting, tuple(wanted))
    if plain is not module.float_class:
        module.float_class = plain


def _refuse_bypasses(model: nn.Module, changes: Changes) -> None:
    """Torch's encoder packs padded batches into nested tensors, which only its fused layers take."""
    for module in model.modules():
        masked = any(isinstance(inner, MaskedWeights) for inner in module.modules())
        if isinstance(module, nn.TransformerEncoder) and masked:
            changes.set_attribute(module, "use_nested_tensor", False)


def check_model(model: nn.Module, settings: Mapping[str, MaskSettings]) -> dict[str, PatternCheck]:
    """How far each weight follows its pattern, as the model computes with it."""
    found = {}
    for name, setting in settings.items():
        layer, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(layer)
        masked = isinstance(module, MaskedWeights)
        weight = module.masked(attribute) if masked else getattr(module, attribute)
        pattern = module.current_pattern if masked else setting.pattern
        found[name] = check(layout_of(module).rows(weight.detach()), pattern)
    return found


def bake(model: nn.Module) -> nn.Module:
    """Write the zeros into the weights and turn masked layers back into plain ones, in place; returns the model.

    For export and for code that knows only torch's layers. What ``fxslim.save`` writes afterwards still has the plan.

    >>> import fxslim
    >>> net = fxslim.sparsity.bake(fxslim.sparsify(nn.Sequential(nn.Linear(8, 4)), "2:4"))
    >>> type(net[0]).__name__, fxslim.patterns.check(net[0], "2:4").ok
    ('Linear', True)
    """
    changes = Changes()
    try:
        for module in model.modules():
            if isinstance(module, MaskedWeights):
                _bake_layer(module, changes)
        plans = [_baked(plan) for plan in applied(model)]
        if plans:
            changes.set_attribute(model, "_fxslim_plans", plans)
    except BaseException:
        changes.undo()
        raise
    return model


def _baked(plan: Any) -> Any:
    return dataclasses.replace(plan, baked=True) if hasattr(plan, "baked") else plan


def _bake_layer(module: MaskedWeights, changes: Changes) -> None:
    names, plain = module.weight_names, module.float_class
    before = dict(vars(module)), dict(module._buffers), dict(module._forward_pre_hooks)
    for name in names:
        weight = getattr(module, name)
        changes.replace_data(weight, module.masked(name).detach().clone(), weight.grad)

    def restore() -> None:
        vars(module).update(before[0])
        module._buffers.clear()
        module._buffers.update(before[1])
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(before[2])

    changes.make(lambda: strip_masks(module, names), restore)
    with torch.no_grad():
        vars(module).pop("float_class", None)
        changes.set_attribute(module, "__class__", plain)
