# SPDX-License-Identifier: Apache-2.0
"""Convolutions of one, two and three dims: grouped, depthwise with a multiplier, transposed."""

import random

import pytest
import torch
from torch import nn

from tests.graph.proofs import check_family

CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}


def around(dims: int, channels: int, middle: nn.Module, made: int) -> nn.Sequential:
    plain = CONVS[dims][0]
    return nn.Sequential(plain(3, channels, 3, padding=1), nn.ReLU(), middle, nn.Tanh(), plain(made, 4, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_grouped_with_unequal_sides(dims: int, transposed: bool, seed: int) -> None:
    pick = random.Random(seed)
    groups, reads, makes = pick.choice([2, 3, 4]), pick.choice([4, 5, 7]), pick.choice([3, 5, 6])
    kernel, bias = pick.choice([1, 2, 3]), pick.choice([True, False])
    middle = CONVS[dims][transposed](groups * reads, groups * makes, kernel, groups=groups, bias=bias)
    model = around(dims, groups * reads, middle, groups * makes)
    check_family(model, torch.randn(2, 3, *[5] * dims), prunes="0 2", ratio=0.35, seed=seed)
    assert middle.weight.shape[0] == (middle.in_channels if transposed else middle.out_channels)
    assert middle.groups == groups


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_with_a_multiplier(dims: int, transposed: bool, multiplier: int) -> None:
    channels = 9
    middle = CONVS[dims][transposed](channels, multiplier * channels, 3, padding=1, groups=channels)
    model = around(dims, channels, middle, multiplier * channels)
    check_family(model, torch.randn(2, 3, *[5] * dims), prunes="2", seed=multiplier + dims)
    assert middle.groups == middle.in_channels < channels
    assert middle.out_channels == multiplier * middle.in_channels


def test_channels_behind_a_depthwise_multiplier_meet_others() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
            self.wide = nn.Conv2d(6, 12, 3, padding=1, groups=6)
            self.end = nn.Conv2d(12, 4, 1)

        def forward(self, x):
            return self.end(torch.relu(self.wide(self.a(x)) + self.b(x)))

    model = check_family(Sum(), torch.randn(2, 3, 6, 6), prunes="a b wide")
    assert model.b.out_channels == 2 * model.a.out_channels


def test_unbatched_convolution() -> None:
    check_family(around(2, 8, nn.ConvTranspose2d(8, 12, 3, groups=4), 12), torch.randn(3, 6, 6), prunes="0 2")


def test_macs_of_a_grouped_transposed_convolution() -> None:
    import fxslim

    layer = nn.ConvTranspose2d(8, 12, 3, groups=4)
    assert fxslim.trace(layer, torch.randn(5, 8, 6, 7)).cost.macs == 6 * 7 * 9 * 8 * 12 // 4
