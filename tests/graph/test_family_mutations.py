# SPDX-License-Identifier: Apache-2.0
"""Faults put into the rules of single families of layers: the proof must catch each on a small network of it."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fxslim.graph import groups
from fxslim.graph.rules import channel_blocks, convolution, normalization, recurrent
from tests.graph.proofs import Rows, picture
from tests.graph.random_networks import randomise
from tests.graph.test_layer_families import Calling, Tokens, Words, between
from tests.graph.test_mutations import (
    Patch,
    caught,
    changed_result,
    no_balance,
    rolled_channels,
    without_slot,
)
from tests.graph.test_recurrent_families import Stepped, Tower


def unpooled(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y.tanh(), places, 2)


class Packed(Tower):
    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.stem(x), torch.tensor([4, 2]), batch_first=True)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.meet, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Bilinear(8, 8, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.meet(self.a(x), self.b(x)))


def rows(*middle: nn.Module, made: int = 12) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3), Rows(), nn.Sigmoid(), *middle, nn.Linear(made, 4))


SEQUENCE, PICTURE, WORDS = torch.randn(2, 4, 5), picture(), torch.randint(0, 20, (4, 5))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "lstm": (lambda: Tower(nn.LSTM(6, 9, num_layers=2, bidirectional=True), inputs=6), SEQUENCE),
    "gru": (lambda: Tower(nn.GRU(6, 9, batch_first=True), inputs=6, states=1), SEQUENCE),
    "last state": (lambda: Tower(nn.GRU(6, 9), inputs=6, last=True), SEQUENCE),
    "packed": (lambda: Packed(nn.GRU(6, 9, batch_first=True), inputs=6), SEQUENCE),
    "cells": (lambda: Stepped("lstm", 9, True), SEQUENCE),
    "one step": (lambda: Stepped("lstm", 9, True), SEQUENCE[:, :1]),
    "transposed": (lambda: between(nn.ConvTranspose2d(12, 18, 3, groups=3), made=18), PICTURE),
    "depthwise": (lambda: between(nn.Conv2d(12, 36, 3, groups=12), made=36), PICTURE),
    "pixel shuffle": (lambda: between(nn.PixelShuffle(2), channels=20, made=5), PICTURE),
    "pixel unshuffle": (lambda: between(nn.PixelUnshuffle(2), made=48), PICTURE),
    "unfold": (lambda: between(nn.Unfold(2), nn.Fold((8, 8), 2)), PICTURE),
    "unfold alone": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.Unfold(2), nn.Conv1d(48, 4, 1)), PICTURE),
    "channel shuffle": (lambda: between(nn.ChannelShuffle(3)), PICTURE),
    "glu": (lambda: between(nn.GLU(1), made=6), PICTURE),
    "max unpool": (lambda: between(Calling(unpooled)), PICTURE),
    "instance norm": (lambda: between(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)), PICTURE),
    "rms norm": (lambda: rows(nn.RMSNorm(12)), PICTURE),
    "unweighted": (lambda: between(nn.Sigmoid(), nn.GroupNorm(3, 12, affine=False)), PICTURE),
    "shape norm": (lambda: between(nn.LayerNorm((12, 8, 8))), PICTURE),
    "bag": (lambda: Words(nn.EmbeddingBag(20, 12), nn.Linear(12, 3)), WORDS),
    "bilinear": (Pair, SEQUENCE),
    "tokens": (lambda: Tokens((12,)), PICTURE),
}


def networks_of(name: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def build(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        make, x = NETWORKS[name]
        return randomise(make(), seed), x

    return build


def replaced(module: object, name: str, value: object) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(module, name, value)


def other_numpy(**functions: Callable) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(np), **functions})


def rolled_entries(entries, slots, classes):
    return original_entries({name: np.roll(ids, 1, -1) for name, ids in entries.items()}, slots, classes)


original_entries = groups.settle_entries
original_tied = channel_blocks._tied
original_results = recurrent._results
FAULTS: dict[str, tuple[str, Patch]] = {
    "gates interleaved": ("lstm", replaced(recurrent, "np", other_numpy(tile=np.repeat))),
    "columns of a recurrent weight forgotten": ("gru", without_slot("weight_hh_l0", role="consumer")),
    "rows of a recurrent weight forgotten": ("gru", without_slot("weight_ih_l0", role="producer")),
    "recurrent bias forgotten": ("gru", without_slot("bias_hh_l0")),
    "directions swapped": (
        "lstm", replaced(recurrent, "_results", lambda n, line, r: original_results(n, np.roll(line, 9), r)),
    ),
    "layers not balanced": ("lstm", no_balance),
    "first state not tied": ("gru", replaced(recurrent, "_tie_state", lambda *_: None)),
    "last state shifted": (
        "last state", replaced(recurrent, "_results", lambda n, line, r: original_results(n, line, [np.roll(r[0], 1)])),
    ),
    "sequence shifted": ("lstm", changed_result("lstm", change=rolled_channels)),
    "cell shifted": ("one step", changed_result("lstm_cell", change=rolled_channels)),
    "packed shifted": ("packed", changed_result("_pack_padded_sequence", change=rolled_channels)),
    "unpacked shifted": ("packed", changed_result("_pad_packed_sequence", change=rolled_channels)),
    "transposed groups shifted": ("transposed", changed_result("convolution", change=rolled_channels)),
    "readers of transposed groups forgotten": ("transposed", without_slot("1.weight", role="consumer")),
    "transposed groups not balanced": ("transposed", no_balance),
    "multiplied channels interleaved": (
        "depthwise", replaced(convolution, "np", other_numpy(repeat=lambda line, n: np.tile(line, n))),
    ),
    "shuffled pixels not tied": ("pixel shuffle", replaced(channel_blocks, "_tied", lambda p, r: r[:, 0])),
    "shuffled pixels interleaved": (
        "pixel shuffle", replaced(channel_blocks, "_tied", lambda p, r: original_tied(p, r.T.reshape(r.shape))),
    ),
    "unshuffled pixels interleaved": (
        "pixel unshuffle", replaced(channel_blocks, "np", other_numpy(repeat=lambda line, n: np.tile(line, n))),
    ),
    "unfold shifted": ("unfold alone", changed_result("im2col", change=rolled_channels)),
    "fold shifted": ("unfold", changed_result("col2im", change=rolled_channels)),
    "channel shuffle shifted": ("channel shuffle", changed_result("channel_shuffle", change=rolled_channels)),
    "channel shuffle not tied": ("channel shuffle", replaced(channel_blocks, "_tied", lambda p, r: r[:, 0])),
    "gate shifted": ("glu", changed_result("glu", change=rolled_channels)),
    "unpool shifted": ("max unpool", changed_result("max_unpool2d", change=rolled_channels)),
    "instance norm shifted": ("instance norm", changed_result("instance_norm", change=rolled_channels)),
    "instance norm's statistics forgotten": ("instance norm", without_slot("running_mean")),
    "rms norm shifted": ("rms norm", changed_result("rms_norm", change=rolled_channels)),
    "size of a norm forgotten": ("unweighted", replaced(normalization, "_follow_size", lambda *_: True)),
    "norm over several dims forgotten": ("shape norm", without_slot("1.bias")),
    "bag shifted": ("bag", changed_result("_embedding_bag", "_embedding_bag_forward_only", change=rolled_channels)),
    "bilinear shifted": ("bilinear", changed_result("bilinear", change=rolled_channels)),
    "bilinear reader forgotten": ("bilinear", without_slot("meet.weight", role="consumer")),
    "direct parameter shifted": ("tokens", replaced(groups, "settle_entries", rolled_entries)),
    "direct parameter forgotten": ("tokens", replaced(groups, "settle_entries", lambda *_: ([], []))),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, patch = FAULTS[name]
    patch(monkeypatch)
    assert caught(networks_of(network), networks=20), f"{name}: no network noticed"


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_fault_nothing_is_caught(name: str) -> None:
    assert not caught(networks_of(name), networks=20)
