# SPDX-License-Identifier: Apache-2.0
"""Faults put into the rules of weights and tables that are handed to functions: the proof must catch each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxslim.graph.propagation import operator_name
from fxslim.graph.rules import convolution, linear
from tests.graph.proofs import picture
from tests.graph.random_networks import randomise
from tests.graph.test_direct_weights import BiasInPieces, Blur, ConvWithBiasInPieces, Repeated, TransposedWeight, tokens
from tests.graph.test_family_mutations import replaced
from tests.graph.test_mutations import Patch, caught, changed_result, no_freezing, rolled_channels, without_slot
from tests.graph.test_position_tables import Outlook, Permuted, ResizedTable, Rows, Windows


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.max(1)[0]


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "blur": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), Blur(8), nn.Conv2d(8, 5, 1)), picture()),
    "groups written down": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), Blur(8, groups=8), nn.Conv2d(8, 9, 1), nn.Conv2d(9, 5, 1)), picture()
    ),
    "bias in pieces": lambda: (tokens(lambda width, _: BiasInPieces(width, 4), 0), picture()),
    "bias of a convolution": lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), ConvWithBiasInPieces(8)), picture()),
    "over positions": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.Linear(64, 6), Rows(), nn.Linear(8, 5)), picture()
    ),
    "repeated": lambda: (tokens(Repeated, 0), picture()),
    "maxima": lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), Rows(), Largest(), nn.Linear(8, 5)), picture()),
    "transposed": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), Rows(), TransposedWeight(8), nn.Linear(8, 5)), picture()
    ),
    "resized": lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), ResizedTable(8, 4), nn.Linear(8, 5)), picture()),
    "outlook": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 1), Permuted(), Outlook(8, 4), nn.Conv2d(8, 5, 1)), picture(3, 5)
    ),
    "windows": lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), Windows(), nn.Conv2d(8, 5, 1)), picture(3, 10)),
}  # fmt: skip


def dims_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight that is transposed by the numbers of its dims, the inputs are taken for the outputs."""
    original = linear._out_dim

    def out_dim(value):
        return original(value) ^ (operator_name(value) == "transpose")

    monkeypatch.setattr(linear, "_out_dim", out_dim)


FAULTS: dict[str, tuple[str, Patch]] = {
    "filter forgotten": ("blur", without_slot("filter")),
    "groups not followed": ("blur", replaced(convolution, "_follow_groups", lambda *_: None)),
    "groups written down are not kept": ("groups written down", no_freezing),
    "pieces of a bias shifted": ("bias in pieces", replaced(linear, "combined", lambda p, n, both, s: both[0])),
    "pieces of a convolution's bias shifted": (
        "bias of a convolution", replaced(convolution, "_with_computed_bias", lambda p, n, made, c: made),
    ),
    "positions shifted": ("over positions", changed_result("addmm", change=rolled_channels)),
    "copies shifted": ("repeated", changed_result("repeat", change=rolled_channels)),
    "places and values shifted": ("maxima", changed_result("max", change=rolled_channels)),
    "resized table shifted": ("resized", changed_result("upsample_bicubic2d", change=rolled_channels)),
    "weight transposed once too often": ("transposed", dims_exchanged),
    "windows shifted": ("windows", changed_result("unfold", change=rolled_channels)),
}  # fmt: skip


def build(case: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def built(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        model, x = CASES[case]()
        return randomise(model, seed), x

    return built


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, patch = FAULTS[name]
    patch(monkeypatch)
    assert caught(build(case), networks=8), f"{name}: not noticed"


@pytest.mark.parametrize("case", CASES)
def test_without_a_fault_nothing_is_caught(case: str) -> None:
    assert not caught(build(case), networks=4)
