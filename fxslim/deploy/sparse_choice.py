# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model skip their zeros once it is converted, and why others stay dense."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.deploy.layer_conversion import BLOCKS, DENSE, SEMI_STRUCTURED
from fxslim.deploy.readiness import refuse_violations
from fxslim.deploy.sparse_speed import why_dense
from fxslim.errors import ConfigError
from fxslim.graph.computed_layers import find_computed_layers
from fxslim.graph.inputs import Inputs
from fxslim.graph.weight_users import find_users
from fxslim.kernels.block_layout import blocks_of
from fxslim.nn import Conv2dQAT, HandedOver, LinearQAT, MaskedConv2d, MaskedLinear, MaskedWeights, QuantizedLayer
from fxslim.nn.semi_structured_linear import why_not_semi_structured
from fxslim.patterns import NM, Block, Pattern
from fxslim.plan.applied_plans import applied
from fxslim.sparsity.sparsity_plan import SparsityPlan

_KINDS = (nn.Conv2d, nn.Linear, MaskedConv2d, MaskedLinear, Conv2dQAT, LinearQAT)
_ATTENTION = "nn.MultiheadAttention multiplies with its weight itself"


@dataclass(frozen=True, kw_only=True)
class SparseChoice:
    """What becomes of a layer with zeros: ``form``, and why it is dense."""

    form: str
    pattern: Pattern
    why: str = ""


def choose_sparse(model: nn.Module, examples: Iterable[Inputs], sparse: Any) -> dict[str, SparseChoice]:
    """By name: masked layers of any kind, and plain and quantized ones that have zero blocks."""
    if not (sparse == "auto" or isinstance(sparse, bool)):
        raise ConfigError(f"sparse must be 'auto', True (wherever there are zero blocks) or False, got {sparse!r}")
    planned, inside = _planned_patterns(model), _inside_attention(model)
    found = {}
    for name, module in model.named_modules():
        masked = isinstance(module, MaskedWeights) and bool(module.weight_names)
        pattern = _pattern(module, planned.get(f"{name}.weight".lstrip(".")), masked)
        if masked or _has_zeros(module, pattern):
            if sparse is not False and masked and isinstance(pattern, Block):
                refuse_violations(name, module)
            why = _ATTENTION if id(module) in inside else _why_never(module)
            found[name] = _choice(module, pattern, why, sparse)
    others = _read_by_others(model, examples, [name for name, choice in found.items() if choice.form != DENSE])
    return found | {
        name: SparseChoice(form=DENSE, pattern=found[name].pattern, why=why) for name, why in others.items()
    }


def _planned_patterns(model: nn.Module) -> dict[str, Pattern]:
    """The patterns of weights that had masks once."""
    plans = [plan for plan in applied(model) if isinstance(plan, SparsityPlan)]
    return {one.name: one.settings.pattern for plan in plans for one in plan.weights}


def _inside_attention(model: nn.Module) -> set[int]:
    owners = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {id(module) for owner in owners for module in owner.modules()}


def _pattern(module: Any, planned: Pattern | None, masked: bool) -> Pattern:
    return module.current_pattern if masked else planned or Block()


def _weight(module: Any) -> Tensor:
    return (module.masked() if isinstance(module, MaskedWeights) else module.weight).detach()


def kept_fraction(weight: Tensor, pattern: Block) -> float:
    """The fraction of blocks that are not zero, at one kernel position each.

    >>> kept_fraction(torch.eye(4), Block(cin=2, cout=2))
    0.5
    """
    kept = (blocks_of(weight, pattern.cin, pattern.cout) != 0).flatten(3).any(3)
    return int(kept.sum()) / max(kept.numel(), 1)


def _has_zeros(module: nn.Module, pattern: Pattern) -> bool:
    if type(module) not in _KINDS or not isinstance(module._parameters.get("weight"), Tensor):
        return False
    weight = _weight(module)
    if weight.is_meta or not weight.numel() or getattr(module, "groups", 1) != 1:
        return False
    return not isinstance(pattern, Block) or kept_fraction(weight, pattern) < 1


def _why_never(module: Any) -> str:
    """Why a layer can't skip zeros at all."""
    if isinstance(module, HandedOver):
        return "another module reads its weight"
    if type(module) not in _KINDS:
        return f"there are no kernels for a {type(module).__name__}"
    if getattr(module, "groups", 1) != 1:
        return f"it has {module.groups} groups"
    return "its weight has no values (meta device)" if _weight(module).is_meta else ""


def _choice(module: Any, pattern: Pattern, why: str, sparse: Any) -> SparseChoice:
    form = BLOCKS if isinstance(pattern, Block) else SEMI_STRUCTURED
    if not why and sparse is False:
        why = "sparse=False"
    elif not why and not isinstance(pattern, Block):
        why = _why_not_2_4(module, pattern)
    elif not why and isinstance(pattern, Block) and sparse == "auto":
        weight = _weight(module)
        dtype = torch.int8 if isinstance(module, QuantizedLayer) else weight.dtype
        why = why_dense(tuple(weight.shape), kept_fraction(weight, pattern), dtype, weight.device.type)
    return SparseChoice(form=DENSE if why else form, pattern=pattern, why=why)


def _why_not_2_4(module: Any, pattern: Pattern) -> str:
    if pattern != NM(2, 4):
        return f"kernels skip whole blocks, not the zeros of {pattern}"
    if isinstance(module, QuantizedLayer):
        return "it is quantized, and 2:4 kernels compute in floating point"
    return why_not_semi_structured(_weight(module))


def _read_by_others(model: nn.Module, examples: Iterable[Inputs], names: list[str]) -> dict[str, str]:
    """Why the weights of these layers must stay where they are."""
    if not names:
        return {}
    computed, users, holders = find_computed_layers(model), find_users(model, examples, None), _holders(model)
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        # The quantizer of a weight reads it for its layer.
        user = None if isinstance(layer, QuantizedLayer) else users.get(f"{name}.weight".lstrip("."))
        others = [other for other in holders[id(layer._parameters["weight"])] if other != name]
        if name in computed:
            found[name] = "its weight is computed before each forward"
        elif user is not None:
            found[name] = f"{'another module' if user == name else user or 'the model'} reads its weight"
        elif others:
            found[name] = f"it shares its weight with {', '.join(others)}"
    return found


def _holders(model: nn.Module) -> Mapping[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            found.setdefault(id(parameter), []).append(name)
    return found
