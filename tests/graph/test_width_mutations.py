# SPDX-License-Identifier: Apache-2.0
"""Faults put into narrower heads, shared heads and scales that depend on a width: the proof must catch each."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import PlanError, TraceError
from fxslim.graph import width_scales
from fxslim.graph.inputs import Inputs
from fxslim.graph.labels import LabelSpace
from fxslim.graph.rules import attention, products
from fxslim.pruning import pruning_plan
from fxslim.pruning.verification import TOLERANCE
from tests.graph.attention_networks import Correlation, ScaledAttention, SharedHead
from tests.graph.random_networks import randomise
from tests.graph.test_attention import Transformer
from tests.graph.test_attention import X as TOKENS
from tests.graph.test_family_mutations import replaced
from tests.graph.test_mutations import Patch


def without(module: object, name: str, *methods: str) -> Patch:
    """A function of a module during which nothing is unified (or the given methods do nothing)."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(module, name)

        def instead(*args, **kwargs):
            with monkeypatch.context() as inside:
                for method in methods:
                    inside.setattr(LabelSpace, method, lambda *_: None)
                return original(*args, **kwargs)

        monkeypatch.setattr(module, name, instead)

    return patch


def all_entries(self, line):
    """Every channel of the layer is scaled, not the queries alone."""
    found = SETTLE(self, line)
    if found:
        self.scalings[:] = [
            width_scales.Scaling(
                name=one.name,
                dim=one.dim,
                entries=tuple(range(self.propagation.states[one.name].shape[one.dim])),
                factor=one.factor,
            )
            for one in self.scalings
        ]
    return found


SETTLE = width_scales.WidthScales._settle

FAULTS: dict[str, tuple[str, Patch]] = {
    "number forgotten": ("math", replaced(width_scales.WidthScales, "find", lambda _: [])),
    "scaling not applied": ("default", replaced(pruning_plan, "scaled_values", lambda _m, _s, values: values)),
    "values scaled too": ("fused", replaced(width_scales.WidthScales, "_settle", all_entries)),
    "degree taken for one": (
        "correlation", replaced(width_scales._Degrees, "_degree", lambda *_: (1, True)),
    ),
    "scale of the module forgotten": ("module", replaced(attention, "_keep_scale", lambda *_: None)),
    "queries and keys of the module apart": ("module", without(attention, "_projections", "unify")),
    "queries and keys apart": ("math", without(products, "_product", "unify")),
    "shared keys not kept": ("whole merged", without(products, "_without_shared", "freeze")),
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, object, str]:
    if name == "correlation":
        return Correlation(), Inputs(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)), "whole"
    if name.startswith("whole"):
        return SharedHead(name.partition(" ")[2]), torch.randn(2, 7, 8), "whole"
    if name == "module":
        return Transformer("module"), TOKENS, "dim"
    fused = name == "fused"
    return ScaledAttention("math" if fused else name, fused=fused), torch.randn(2, 7, 8), "dim"


def caught(build: Callable[[], tuple[nn.Module, object, str]], seeds: int) -> bool:
    """Whether verify says of some random plan that it differs; a plan that can't be made does not count."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, inputs, heads = build()
        randomise(model, seed)
        try:
            plan = fxslim.plan_pruning(
                model, inputs, ratio=0.35, target="channels", importance="random", seed=seed, heads=heads
            )
        except (PlanError, TraceError, RuntimeError, IndexError, ValueError, KeyError):
            continue
        if plan.verify(model, inputs).relative > TOLERANCE:
            return True
    return False


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, patch = FAULTS[name]
    patch(monkeypatch)
    assert caught(lambda: network(kind), 8), f"{name}: no network noticed"


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FAULTS.values()}))
def test_without_a_fault_nothing_is_caught(kind: str) -> None:
    assert not caught(lambda: network(kind), 4)
