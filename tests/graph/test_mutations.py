# SPDX-License-Identifier: Apache-2.0
"""Faults put into the propagation on purpose: the proof must catch each of them."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxslim import plan_pruning
from fxslim.errors import PlanError
from fxslim.graph import propagation as walk
from fxslim.graph.labels import Labels, LabelSpace, along
from fxslim.graph.propagation import RULES, Propagation
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import RandomNetwork

Patch = Callable[[pytest.MonkeyPatch], None]


def random_network(seed: int) -> tuple[nn.Module, Tensor]:
    return RandomNetwork(seed), torch.randn(2, 3, 8, 8)


def caught(build: Callable[[int], tuple[nn.Module, Tensor]] = random_network, networks: int = 120) -> bool:
    """Whether verify says of any random network that it differs; a plan that can't be made does not count."""
    for seed in range(networks):
        model, x = build(seed)
        try:
            plan = plan_pruning(model, x, ratio=0.3, importance="random", seed=seed)
        except (PlanError, RuntimeError, IndexError, ValueError, KeyError):
            continue
        if plan.verify(model, x).relative > TOLERANCE:
            return True
    return False


def without_slot(suffix: str, role: str | None = None) -> Patch:
    """Entries of parameters with this name (and role) are forgotten."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = Propagation.slot

        def slot(self, name, dim, ids=None, **settings):
            found = original(self, name, dim, ids, **settings)
            if name.endswith(suffix) and role in (None, settings.get("role")):
                del self.slots[name, dim]
            return found

        monkeypatch.setattr(Propagation, "slot", slot)

    return patch


def changed_result(*names: str, change: Callable[[Labels], Labels]) -> Patch:
    """The labels that a rule returns are changed."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for name in names:
            original = RULES[name]

            def rule(propagation, node, original=original):
                result = original(propagation, node)
                if isinstance(result, list):
                    return [change(result[0]), *result[1:]] if len(result) == 1 else [change(r) for r in result]
                return change(result)

            monkeypatch.setitem(RULES, name, rule)

    return patch


def reversed_channels(labels: Labels) -> Labels:
    return Labels(shape=labels.shape, ids=np.flip(labels.ids)) if len(labels.varying) == 1 else labels


def rolled_channels(labels: Labels) -> Labels:
    if len(labels.varying) != 1:
        return labels
    return along(labels.shape, labels.varying[0], np.roll(labels.ids.reshape(-1), 1))


def swapped_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RULES["split"]
    monkeypatch.setitem(RULES, "split", lambda p, n: r[::-1] if isinstance(r := original(p, n), list) else r)


def no_balance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabelSpace, "balance", lambda self, rows, reason: None)


def no_unification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabelSpace, "unify", lambda self, a, b: None)


def no_freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LabelSpace, "freeze", lambda self, ids, reason: None)


def blocks_as_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Propagation.slot

    def slot(self, name, dim, ids=None, *, blocks=1, **settings):
        if blocks > 1 and ids is not None and (name, dim) not in self.slots:
            ids = ids[: len(ids) // blocks]
        return original(self, name, dim, ids, **settings)

    monkeypatch.setattr(Propagation, "slot", slot)


def unlabelled_operands_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    original = walk.combined
    monkeypatch.setattr(
        "fxslim.graph.rules.elementwise.combined",
        lambda p, n, operands, shape: original(p, n, operands[:1], shape),
    )


def wrong_kept_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot of each plan keeps the right number of wrong entries."""
    from fxslim.graph.surgery import cutting

    original = cutting.cut_tensor

    def cut_tensor(tensor, cuts):
        first = cuts[0]
        keep = (*first.keep[1:], first.keep[0])
        return original(tensor, [dataclasses.replace(first, keep=keep), *cuts[1:]])

    monkeypatch.setattr(cutting, "cut_tensor", cut_tensor)


FAULTS: dict[str, Patch] = {
    "bias forgotten": without_slot(".bias"),
    "running mean forgotten": without_slot("running_mean"),
    "running variance forgotten": without_slot("running_var"),
    "layer scale forgotten": without_slot("gamma"),
    "readers forgotten": without_slot(".weight", role="consumer"),
    "depthwise forgotten": without_slot(".weight", role="depthwise"),
    "cat backwards": changed_result("cat", change=reversed_channels),
    "cat shifted": changed_result("cat", change=rolled_channels),
    "convolution shifted": changed_result("convolution", change=rolled_channels),
    "batch norm shifted": changed_result("native_batch_norm", change=rolled_channels),
    "group norm shifted": changed_result("native_group_norm", change=rolled_channels),
    "layer norm shifted": changed_result("native_layer_norm", change=rolled_channels),
    "relu backwards": changed_result("relu", change=reversed_channels),
    "pool shifted": changed_result("max_pool2d_with_indices", change=rolled_channels),
    "reduction shifted": changed_result("mean", change=rolled_channels),
    "flatten backwards": changed_result("view", "_unsafe_view", "reshape", change=reversed_channels),
    "permute backwards": changed_result("permute", change=reversed_channels),
    "prelu shifted": changed_result("_prelu_kernel", change=rolled_channels),
    "sum shifted": changed_result("add", change=rolled_channels),
    "chunks swapped": swapped_chunks,
    "no balance": no_balance,
    "nothing unified": no_unification,
    "nothing frozen": no_freezing,
    "groups cut alike": blocks_as_plain,
    "second operand ignored": unlabelled_operands_ignored,
    "wrong entries kept": wrong_kept_channels,
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    assert caught(), f"{name}: no random network noticed"


def test_without_a_fault_nothing_is_caught() -> None:
    assert not caught()
