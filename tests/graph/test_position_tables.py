# SPDX-License-Identifier: Apache-2.0
"""Attention with tables of positions that are resized, transposed or slid over, and with scores that a layer makes."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.graph.proofs import Rows, check_family, picture, stays


class ResizedTable(nn.Module):
    """A table of positions (1, H, W, C), interpolated to the picture's size and added in place."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, size, size, width))

    def forward(self, x: Tensor) -> Tensor:
        table = functional.interpolate(self.table.permute(0, 3, 1, 2), size=x.shape[-2:], mode="bicubic")
        x = x.flatten(2).transpose(1, 2).contiguous()
        return x.add_(table.flatten(2).transpose(1, 2))


class RelativeLogits(nn.Module):
    """Attention over a picture whose scores get a product of queries and a transposed table of offsets."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.offsets = nn.Parameter(torch.randn(size, self.head_dim) * 0.3)
        self.columns = nn.Parameter(torch.randn(self.head_dim, size) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = (
            part.reshape(batch * self.heads, self.head_dim, -1).mT for part in self.qkv(x).chunk(3, dim=1)
        )  # fmt: skip
        bias = q @ self.offsets.transpose(-1, -2) + q @ self.columns
        scores = (q @ k.mT).softmax(-1) + bias.repeat(1, 1, height * width // bias.shape[-1])
        return (scores @ v).mT.reshape(batch, -1, height, width)


class Outlook(nn.Module):
    """Scores over a neighbourhood that a layer makes of each place, applied to unfolded values, folded again."""

    def __init__(self, width: int, heads: int, kernel: int = 3) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.v, self.scores = nn.Linear(width, width), nn.Linear(width, heads * kernel**4)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        places, area = height * width, self.kernel * self.kernel
        v = functional.unfold(self.v(x).permute(0, 3, 1, 2), self.kernel, padding=self.kernel // 2)
        v = v.reshape(batch, self.heads, channels // self.heads, area, places).permute(0, 1, 4, 3, 2)
        scores = self.scores(x).reshape(batch, places, self.heads, area, area).permute(0, 2, 1, 3, 4).softmax(-1)
        x = (scores @ v).permute(0, 1, 4, 3, 2).reshape(batch, channels * area, places)
        return functional.fold(x, (height, width), self.kernel, padding=self.kernel // 2)


class Windows(nn.Module):
    """Overlapping windows over rows and columns, averaged."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unfold(2, 4, 2).unfold(3, 4, 2).mean((4, 5))


@pytest.mark.parametrize("seed", range(4))
def test_resized_tables(seed: int) -> None:
    width = random.Random(seed).randint(4, 12)
    table = ResizedTable(width, 3 + seed)
    check_family(nn.Sequential(nn.Conv2d(3, width, 1), table, nn.Linear(width, 5)), picture(), prunes="0", seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_transposed_tables_in_attention(seed: int) -> None:
    width = 3 * random.Random(seed).randint(2, 5)
    model = nn.Sequential(nn.Conv2d(3, width, 1), RelativeLogits(width, 3, 8), nn.Conv2d(width, 5, 1))
    check_family(model, picture(3, 4), prunes="0 1.qkv", seed=seed)
    assert model[1].offsets.shape[0] == 8


@pytest.mark.parametrize("seed", range(4))
def test_scores_that_a_layer_makes(seed: int) -> None:
    heads = random.Random(seed).randint(3, 5)
    width = 2 * heads
    model = nn.Sequential(nn.Conv2d(3, width, 1), Permuted(), Outlook(width, heads), nn.Conv2d(width, 5, 1))
    check_family(model, picture(3, 5), prunes="0 2.v 2.scores", seed=seed)
    assert model[2].heads < heads


@pytest.mark.parametrize("seed", range(3))
def test_windows(seed: int) -> None:
    width = random.Random(seed).randint(4, 12)
    net = nn.Sequential(nn.Conv2d(3, width, 1), Windows(), nn.Conv2d(width, 5, 1))
    check_family(net, picture(3, 10), prunes="0", seed=seed)


class WindowsOfChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unfold(1, 3, 1).amax(-1)


def test_windows_over_channels_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), WindowsOfChannels(), nn.Conv2d(6, 5, 1))
    stays(net, picture(), "0", "windows over channels")


class TransposedTable(nn.Module):
    """A table (C, positions) that is transposed and added: no weight, its rows are channels."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(width, positions))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.t() + self.table.transpose(0, 1)


def test_a_transposed_table_is_added() -> None:
    net = nn.Sequential(nn.Conv2d(3, 9, 1), Rows(), TransposedTable(9, 64), nn.Linear(9, 5))
    check_family(net, picture(), prunes="0")


class Permuted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)
