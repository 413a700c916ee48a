# SPDX-License-Identifier: Apache-2.0
"""Faults put into heads that get narrower, biases that are made, tables and balances: the proof must catch each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxslim.graph import steps
from fxslim.graph.labels import LabelSpace
from fxslim.graph.propagation import RULES
from tests.graph.random_networks import randomise
from tests.graph.random_transformers import RandomTransformer
from tests.graph.test_family_mutations import replaced
from tests.graph.test_mutations import Patch, caught, changed_result, rolled_channels
from tests.graph.test_shared_kernels import MadeBias, MadeTable, PooledAttention


def no_unification_in(*names: str) -> Patch:
    """Inside the rules of these operators nothing is unified."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:
            original = RULES[name]

            def rule(propagation, node, original=original):
                with monkeypatch.context() as inside:
                    inside.setattr(LabelSpace, "unify", lambda *_: None)
                    return original(propagation, node)

            monkeypatch.setitem(RULES, name, rule)

    return patch


def pooled(seed: int) -> tuple[nn.Module, Tensor]:
    pools = ("qkv", "kv", "q")[seed % 3]
    return PooledAttention(16, 2, pools, fused=seed % 2 == 0), torch.randn(2, 17, 8)


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "pooled": pooled,
    "bias": lambda seed: (MadeBias("parts" if seed % 2 else "in place"), torch.randn(2, 16, 8)),
    "table": lambda seed: (MadeTable(), torch.randn(2, 16, 8)),
    "transformer": lambda seed: (RandomTransformer(seed), torch.randn(2, 3, 8, 8)),
}
FAULTS: dict[str, tuple[str, Patch]] = {
    "channels of a shared kernel shifted": ("pooled", changed_result("convolution", change=rolled_channels)),
    "queries and keys lose different entries": ("pooled", no_unification_in("bmm")),
    "queries and values added without a tie": ("pooled", no_unification_in("add")),
    "a made bias not followed": ("bias", no_unification_in("addmm")),
    "parts of a bias shifted": ("bias", changed_result("cat", "clone", change=rolled_channels)),
    "tables added without a tie": ("table", no_unification_in("add")),
    "no balance kept": ("transformer", replaced(steps, "joined_balances", lambda _: [])),
    "windows shifted": ("transformer", changed_result("roll", "permute", change=rolled_channels)),
    "tokens shifted": ("transformer", changed_result("cat", "expand", change=rolled_channels)),
}


def networks_of(name: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def build(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        model, x = NETWORKS[name](seed)
        return randomise(model, seed), x

    return build


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, patch = FAULTS[name]
    patch(monkeypatch)
    assert caught(networks_of(network), networks=24), f"{name}: no network noticed"


@pytest.mark.parametrize("network", NETWORKS)
def test_without_a_fault_nothing_is_caught(network: str) -> None:
    assert not caught(networks_of(network), networks=12)
