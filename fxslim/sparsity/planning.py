# SPDX-License-Identifier: Apache-2.0
"""plan_sparsity and sparsify: from what a user wishes to a plan."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fxslim.batches import Data, Forward, Loss, as_data, repeatable
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.layer_choice import Chosen
from fxslim.graph.recording import named_states
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.nn import MaskSettings
from fxslim.patterns import NM, Pattern, as_pattern
from fxslim.schedules import Schedule
from fxslim.sparsity.eligible_weights import LayerChoice
from fxslim.sparsity.maskable_weights import find_users
from fxslim.sparsity.methods import Method, as_method
from fxslim.sparsity.ratios import adaptive_ratios, global_ratios
from fxslim.sparsity.sparsity_plan import SparsityPlan, WeightPlan

_USUAL_RATIO = 0.5
_SCOPES = ("layer", "global")


@dataclass(frozen=True, kw_only=True)
class _Wishes:
    pattern: Pattern
    method: Method


def plan_sparsity(
    model: nn.Module,
    pattern: Any = "2:4",
    *,
    ratio: float | None = None,
    layers: Chosen | None = None,
    skip: Chosen = (),
    overrides: Mapping[str | type, Any] | None = None,
    method: Any = "magnitude",
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    example_inputs: Any = None,
    scope: str = "layer",
    uniform: bool = True,
    progressive: bool | int = False,
    update_freq: int | None = None,
    gradient: str = "zero",
    regrow: float = 0.0,
    schedule: Schedule | None = None,
    ineligible: str = "warn",
    chip: str | None = None,
    bits: int = 8,
) -> SparsityPlan:
    """Decide which weights get a mask, of which pattern; the model is not touched.

    ``pattern``: "2:4", "cin32cout64", "unstructured", or one of ``fxslim.patterns``; ``ratio`` is the fraction that
    goes, for patterns that leave it open (0.5). ``overrides``: {layer: ratio or pattern}. ``method``: "magnitude",
    "l2", "first_order", "wanda", "par", "par_v2", "hessian", or one of ``fxslim.sparsity``; most look at ``data``.
    ``scope="global"`` ranks all layers together, ``uniform=False`` gives sensitive layers less to lose; ``ratio`` is
    then that of all. ``progressive``: layer by layer, each from what it reads once those before it are sparse (a
    number: so many times, ever sparser). ``update_freq``, ``gradient``, ``regrow``, ``schedule``: what happens in
    training, see ``fxslim.nn.MaskSettings``. Layers that can't follow the pattern are left out: ``ineligible`` "warn",
    "error", "ignore". ``chip`` leaves out what this chip's compiler would. With ``example_inputs`` (or ``data``)
    weights that the model hands to a function are found.

    >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> print(plan_sparsity(net, "2:4"))
    weight                 shape  pattern
    0.weight                16x8  2:4
    2.weight                1x16  2:4
    2 weights by magnitude: 72 of 144 entries go
    """
    refuse_wrapped(model)
    model = without_compile_wrapper(model)
    wishes = _checked(pattern, ratio, method, scope, uniform)
    given = None if data is None else repeatable(as_data(data, forward, loss))
    if given is None and (wishes.method.needs or not uniform):
        what = f"method {wishes.method.name!r}" if wishes.method.needs else "uniform=False"
        raise ConfigError(f"{what} looks at data: give data=, batches that the model runs on")
    stages = _stages(progressive, wishes.method)
    examples: tuple[Inputs, ...] = () if example_inputs is None else tuple(as_inputs(example_inputs))
    users = find_users(model, examples, given if not examples else None) if examples or given is not None else {}
    notes: list[str] = []
    choice = LayerChoice(
        layers=layers, skip=skip, overrides=overrides or {}, ineligible=ineligible, chip=chip, bits=bits
    )
    patterns = choice.patterns(model, wishes.pattern, wishes.method, users, notes)
    if not patterns:
        raise ConfigError("no layer is left to make sparse" + "".join(f"\n  {note}" for note in notes))
    if scope == "global" or not uniform:
        patterns = _allotted(model, patterns, wishes, given, uniform)
    made = tuple(
        WeightPlan(
            name=name,
            settings=MaskSettings(
                pattern=own, update_freq=update_freq, gradient=gradient, regrow=regrow,
                schedule=schedule,
            ),
        )
        for name, own in patterns.items()
    )  # fmt: skip
    return SparsityPlan(
        weights=made,
        shapes={name: tuple(state.shape) for name, state in named_states(model)},
        method=wishes.method,
        progressive=stages,
        notes=tuple(notes),
        inputs=examples,
        data=given,
    )


def sparsify(model: nn.Module, pattern: Any = "2:4", *, optimizer: Optimizer | None = None, **wishes: Any) -> nn.Module:
    """``plan_sparsity(model, pattern, ...)`` and ``apply`` in one, in place; returns the model.

    >>> net = sparsify(nn.Sequential(nn.Linear(8, 16)), "2:4")
    >>> net
    Sequential(
      (0): MaskedLinear(in_features=8, out_features=16, bias=True, pattern=2:4)
    )
    """
    return plan_sparsity(model, pattern, **wishes).apply(model, optimizer=optimizer)


def _checked(pattern: Any, ratio: float | None, method: Any, scope: str, uniform: bool) -> _Wishes:
    if scope not in _SCOPES:
        raise ConfigError(unknown_name("scope", str(scope), _SCOPES))
    if not isinstance(uniform, bool):
        raise ConfigError(f"uniform must be True or False, got {uniform!r}")
    chosen, found = as_method(method), as_pattern(pattern).at(ratio)
    if found.removed() is None:
        found = found.at(_USUAL_RATIO)
    if isinstance(found, NM) and (scope == "global" or not uniform):
        asked = "scope='global'" if scope == "global" else "uniform=False"
        raise ConfigError(f"{asked} gives layers ratios of their own, and {found} has one: take a pattern by ratio")
    if scope == "global" and not uniform:
        raise ConfigError("scope='global' ranks all weights together, uniform=False weighs layers: choose one")
    return _Wishes(pattern=chosen.pattern_for(found), method=chosen)


def _stages(progressive: bool | int, method: Method) -> int:
    if isinstance(progressive, float) or not isinstance(progressive, int) or progressive < 0:
        raise ConfigError(f"progressive must be True, False or a number of stages, got {progressive!r}")
    if progressive and not method.needs:
        raise ConfigError(
            f"progressive= looks at what layers read once others are sparse, and method {method.name!r} at weights "
            "alone: give method='hessian', 'wanda', 'par' or 'first_order', or a schedule= for training"
        )
    return int(progressive)


def _allotted(
    model: nn.Module, patterns: dict[str, Pattern], wishes: _Wishes, data: Data | None, uniform: bool
) -> dict[str, Pattern]:
    """The patterns with ratios of their own that together remove what the given ones do."""
    if not uniform:
        assert data is not None
        return adaptive_ratios(model, patterns, wishes.method, data)
    return global_ratios(model, patterns, wishes.method, data)
