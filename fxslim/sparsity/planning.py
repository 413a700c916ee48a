# SPDX-License-Identifier: Apache-2.0
"""plan_sparsity and sparsify: from what a user wishes to a plan."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data, Forward, Loss, as_data, repeatable
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.layer_choice import Chosen
from fxslim.graph.recording import named_states
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.graph.weight_users import find_users
from fxslim.nn import MaskSettings
from fxslim.patterns import NM, Pattern, as_pattern
from fxslim.schedules import Schedule
from fxslim.sparsity.adaptive_allocation import adaptive_ratios
from fxslim.sparsity.eligible_weights import LayerChoice
from fxslim.sparsity.global_ranking import global_ratios
from fxslim.sparsity.methods import Method, as_method
from fxslim.sparsity.reordered_channels import Reordering, check_permutable, plan_reordering
from fxslim.sparsity.sparsity_plan import SparsityPlan, WeightPlan

_USUAL_RATIO = 0.5
_SCOPES = ("layer", "global", "adaptive")


@dataclass(frozen=True, kw_only=True)
class _Wishes:
    pattern: Pattern
    method: Method
    scope: str
    permute: bool


def plan_sparsity(
    model: nn.Module,
    pattern: Any = "2:4",
    *,
    ratio: float | None = None,
    layers: Chosen | None = None,
    skip: Chosen = (),
    overrides: Mapping[str | type, Any] | None = None,
    method: str | Method = "magnitude",
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    example_inputs: Any = None,
    scope: str = "layer",
    permute: bool = False,
    progressive: bool | int = False,
    update_freq: int | None = None,
    gradient: str = "zero",
    regrow: float = 0.0,
    schedule: Schedule | None = None,
    ineligible: str = "warn",
    chip: str | None = None,
    bits: int = 8,
) -> SparsityPlan:
    """Decide which weights get a mask, of which pattern; the model is not touched (docs/sparsity.md).

    ``pattern``: "2:4", "cin32cout64", "unstructured", or one of ``fxslim.patterns``; ``ratio``: what goes, where the
    pattern leaves it open (0.5). ``overrides``: {layer: ratio or pattern}. ``method``: magnitude, l2, first_order,
    wanda, par, par_v2, hessian, or one of ``fxslim.sparsity``; most look at ``data``. ``scope``: each "layer" alike,
    one "global" ranking, or "adaptive" by how much outputs suffer. ``permute`` channels first, so that N:M keeps
    more; the model without masks computes what it did. ``progressive``: layer by layer, in so many stages.
    ``update_freq``, ``gradient``, ``regrow``, ``schedule`` are for training: ``fxslim.nn.MaskSettings``. What can't
    follow the pattern (or ``chip``, at ``bits``) stays dense: ``ineligible`` "warn", "error" or "ignore". With
    ``example_inputs`` or ``data`` weights that the model hands to a function are found.
    """
    wished, given = _checked(pattern, ratio, as_method(method), scope, permute), _given(data, forward, loss)
    settings = MaskSettings(
        pattern=wished.pattern, update_freq=update_freq, gradient=gradient, regrow=regrow, schedule=schedule
    )
    choice = LayerChoice(
        layers=layers, skip=skip, overrides={} if overrides is None else overrides, ineligible=ineligible,
        chip=chip, bits=bits,
    )  # fmt: skip
    refuse_wrapped(model)
    examples = () if example_inputs is None else tuple(as_inputs(example_inputs))
    model, stages = without_compile_wrapper(model), _stages(progressive, wished)
    return _planned(model, wished, choice, given, examples, stages, settings)


def sparsify(model: nn.Module, pattern: Any = "2:4", *, optimizer: Optimizer | None = None, **wishes: Any) -> nn.Module:
    """``plan_sparsity(model, pattern, ...)`` and ``apply`` in one, in place; returns the model.

    >>> net = sparsify(nn.Sequential(nn.Linear(8, 16)), "2:4")
    >>> net
    Sequential(
      (0): MaskedLinear(in_features=8, out_features=16, bias=True, pattern=2:4)
    )
    """
    return plan_sparsity(model, pattern, **wishes).apply(model, optimizer=optimizer)


def _planned(
    model: nn.Module,
    wished: _Wishes,
    choice: LayerChoice,
    data: Data | None,
    examples: tuple[Inputs, ...],
    stages: int,
    settings: MaskSettings,
) -> SparsityPlan:
    if data is None and (wished.method.needs or wished.scope == "adaptive"):
        what = f"method {wished.method.name!r}" if wished.method.needs else "scope='adaptive'"
        raise ConfigError(f"{what} looks at data: give data=, batches that the model runs on")
    if wished.permute:
        check_permutable(model, wished.pattern, examples)
    users = find_users(model, examples, None if examples else data)
    patterns, notes = choice.patterns(model, wished.pattern, wished.method, users)
    if not patterns:
        raise ConfigError("no layer is left to make sparse" + "".join(f"\n  {note}" for note in notes))
    if wished.scope == "global":
        patterns = global_ratios(model, patterns, wished.method, data)
    elif wished.scope == "adaptive":
        assert data is not None
        patterns = adaptive_ratios(model, patterns, wished.method, data)
    reordering = plan_reordering(model, patterns, wished.method, data, examples) if wished.permute else Reordering()
    return SparsityPlan(
        weights=tuple(
            WeightPlan(name=name, settings=replace(settings, pattern=own), user=users.get(name))
            for name, own in patterns.items()
        ),
        shapes={name: tuple(state.shape) for name, state in named_states(model)},
        method=wished.method,
        progressive=stages,
        orders=reordering.cuts,
        notes=(*notes, *reordering.notes),
        inputs=examples,
        data=data,
    )


def _given(data: Iterable[Any] | None, forward: Forward | None, loss: Loss | None) -> Data | None:
    if data is None and (forward is not None or loss is not None):
        raise ConfigError("forward= and loss= say how batches are run and scored: give data= with them")
    return None if data is None else repeatable(as_data(data, forward, loss))


def _checked(pattern: Any, ratio: float | None, method: Method, scope: str, permute: bool) -> _Wishes:
    if scope not in _SCOPES:
        raise ConfigError(unknown_name("scope", str(scope), _SCOPES))
    found = as_pattern(pattern).at(ratio)
    if found.removed() is None:
        found = found.at(_USUAL_RATIO)
    if isinstance(found, NM) and scope != "layer":
        raise ConfigError(f"scope={scope!r} gives layers ratios of their own, and {found} has one: take 'unstructured'")
    return _Wishes(pattern=method.pattern_for(found), method=method, scope=scope, permute=permute)


def _stages(progressive: bool | int, wished: _Wishes) -> int:
    if isinstance(progressive, float) or not isinstance(progressive, int) or progressive < 0:
        raise ConfigError(f"progressive must be True, False or a number of stages, got {progressive!r}")
    # Weights alone are the same whatever became sparse before.
    return int(progressive) if wished.method.needs else 0
