# SPDX-License-Identifier: Apache-2.0
"""Turns a model's layers into their masked counterparts, in place."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxslim.errors import PlanError
from fxslim.graph.surgery.changes import Changes
from fxslim.nn import MaskedMultiheadAttention, MaskedWeights, MaskSettings
from fxslim.patterns import PatternCheck, check
from fxslim.patterns.weight_layout import layout_of
from fxslim.plan.applied_plans import module_in
from fxslim.sparsity.maskable_weights import COUNTERPARTS, HANDED_OVER


def put_masks_on(
    model: nn.Module, settings: Mapping[str, MaskSettings], users: Mapping[str, str], changes: Changes
) -> None:
    """Give these weights masks that keep everything so far; the caller restores buffers, attributes and hooks.

    ``users``: the modules that use weights of others.
    """
    of_layer: dict[str, dict[str, MaskSettings]] = {}
    for name, setting in settings.items():
        layer, _, attribute = name.rpartition(".")
        of_layer.setdefault(layer, {})[attribute] = setting
    for layer, wanted in of_layer.items():
        _mask_layer(model, layer, wanted, users.get(f"{layer}.weight".lstrip(".")), changes)
    _refuse_bypasses(model, changes)


def _mask_layer(
    model: nn.Module, layer: str, wanted: Mapping[str, MaskSettings], user: str | None, changes: Changes
) -> None:
    module: Any = model.get_submodule(layer)
    known: Mapping[type[nn.Module], type[MaskedWeights]] = COUNTERPARTS if user is None else HANDED_OVER
    if type(module) not in known:
        raise PlanError(f"{layer or 'the model'} is a {type(module).__name__}, which has no masked counterpart")
    kinds = {dataclasses.replace(setting) for setting in wanted.values()}
    if len(kinds) > 1:
        raise PlanError(f"{layer}: its weights {sorted(wanted)} share one layer and need one pattern, got {kinds}")
    parent: Any = model.get_submodule(layer.rpartition(".")[0]) if layer else model
    setting = next(iter(kinds))
    if user is None and type(parent) is nn.MultiheadAttention and layer.endswith("out_proj"):
        # Its own forward is never called: the owner puts the mask on.
        changes.set_attribute(parent, "__class__", MaskedMultiheadAttention)
        owner: Any = parent
        owner.start_masking(setting, ())
    plain = type(module)
    changes.set_attribute(module, "__class__", known[plain])
    module.start_masking(setting, tuple(wanted))
    if plain is not module.float_class:
        module.float_class = plain
    if user is not None and user != layer:
        module.count_in(model.get_submodule(user))


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
        module: Any = model.get_submodule(module_in(model, layer))
        if getattr(module, attribute, None) is None:
            raise PlanError(f"the model has no {name}: check the model that the plan was applied to, without a wrapper")
        masked = isinstance(module, MaskedWeights)
        weight = module.masked(attribute) if masked else getattr(module, attribute)
        pattern = module.current_pattern if masked else setting.pattern
        found[name] = check(layout_of(module).rows(weight.detach()), pattern)
    return found
