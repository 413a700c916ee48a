# SPDX-License-Identifier: Apache-2.0
"""Layers that work on groups of channels, behind a shuffle: each channel stays in its group, and the proof sees it."""

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.graph.propagation import Propagation
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import randomise
from tests.graph.test_mutations import caught

X = torch.randn(2, 3, 6, 6)
GROUPED = {
    "group norm": lambda: nn.GroupNorm(2, 12),
    "plain group norm": lambda: nn.GroupNorm(2, 12, affine=False),
    "convolution": lambda: nn.Conv2d(12, 8, 3, groups=2),
    "transposed convolution": lambda: nn.ConvTranspose2d(12, 8, 3, groups=2),
    "another shuffle": lambda: nn.ChannelShuffle(2),
}


class GroupsBehindShuffle(nn.Module):
    def __init__(self, layer: nn.Module, rows: int) -> None:
        super().__init__()
        self.conv, self.layer, self.rows = nn.Conv2d(3, 12, 1), layer, rows
        self.head = nn.Conv2d(8 if "Conv" in type(layer).__name__ else 12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        x = x.view(b, self.rows, c // self.rows, h, w).transpose(1, 2).reshape(b, -1, h, w)
        return self.head(self.layer(x).square())


def network(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return randomise(GroupsBehindShuffle(GROUPED[name](), rows=(2, 3, 6)[seed % 3]), seed), X


@pytest.mark.parametrize("name", GROUPED)
def test_channels_stay_in_their_groups(name: str) -> None:
    removed = 0
    for seed in range(24):
        model, x = network(name, seed)
        try:
            plan = fxslim.plan_pruning(model, x, ratio=0.5, importance="random", seed=seed)
        except fxslim.PlanError:
            continue
        removed += any("conv." in cut.name for cut in plan.cuts)
        assert plan.verify(model, x).relative <= TOLERANCE
    assert removed >= 8


@pytest.mark.parametrize("name", ["group norm", "plain group norm", "transposed convolution"])
def test_the_proof_sees_a_channel_that_changes_its_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def balanced_only(self, node, line, groups, reason):
        self.space.balance(line.reshape(groups, -1), reason)

    monkeypatch.setattr(Propagation, "group", balanced_only)
    assert caught(lambda seed: network(name, seed), networks=24)


class Tied(nn.Module):
    """All four channels that come out of one branch go together; they meet four that are free."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.channel_shuffle(self.a(x), 4)
        return self.head(nn.functional.glu(nn.functional.channel_shuffle(a, 2), 1) + self.b(x))


def test_one_channel_over_several_entries_keeps_what_it_meets() -> None:
    model = randomise(Tied())
    graph = fxslim.trace(model, X)
    assert {"a", "b"} <= graph.frozen_layers().keys(), graph
