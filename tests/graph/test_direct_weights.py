# SPDX-License-Identifier: Apache-2.0
"""Layers that hand their weights to functions: filters in buffers, biases in pieces, layers over positions."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.graph.proofs import Rows, check_family, picture, stays


class Blur(nn.Module):
    """A fixed filter for each channel, kept in a buffer; the number of channels is an attribute."""

    def __init__(self, channels: int, groups: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.written_down = groups
        self.register_buffer("filter", torch.rand(channels, 1, 3, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (1, 1, 1, 1), mode="reflect")
        groups = self.channels if self.written_down is None else 8
        return functional.conv2d(x, self.filter, stride=2, groups=groups)


class BlurOfInput(Blur):
    """The number of groups is that of the input's channels."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.filter, padding=1, groups=x.shape[1])


class OwnDepthwise(nn.Module):
    """A module of the user's own with the attributes of a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = channels
        self.weight = nn.Parameter(torch.randn(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, None, 1, 1, 1, self.groups)


class BiasInPieces(nn.Module):
    """Queries, keys and values by one weight whose bias is put together, keys without any."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.weight = nn.Parameter(torch.randn(3 * width, width) * 0.3)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = functional.linear(x.contiguous(), self.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, -1))


class ConvWithBiasInPieces(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * width, width, 1, 1))
        self.first, self.second = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.next = nn.Conv2d(2 * width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(functional.conv2d(x, self.weight, torch.cat((self.first, self.second))).relu())


class TokenMixer(nn.Module):
    """Layers over positions, then layers over channels."""

    def __init__(self, width: int, positions: int, *, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.over_positions = nn.Sequential(nn.Linear(positions, 6, bias=bias), nn.GELU(), nn.Linear(6, positions))
        self.over_channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_positions(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(x)


class Repeated(nn.Module):
    """A table of positions that is repeated for the batch, and channels that are repeated twice."""

    def __init__(self, width: int, positions: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, positions, width))
        self.join = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table.repeat(x.shape[0], 1, 1)
        return self.join(x.repeat(1, 1, 2))


class TransposedWeight(nn.Module):
    """A matrix product with a weight that the code transposes by the numbers of its dims."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.second = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.transpose(-2, -1)) @ self.second.permute(1, 0)


class Maxima(nn.Module):
    """The largest value over positions with its place, as two results, and mean and variance together."""

    def forward(self, x: Tensor) -> Tensor:
        largest, _ = x.max(1)
        variance, mean = torch.var_mean(x, 1)
        return largest * variance.sqrt() + mean


def tokens(layer: Callable[[int, int], nn.Module], seed: int) -> nn.Module:
    """A patch embedding, the layer over 16 positions, and a head."""
    pick = random.Random(seed)
    width = 4 * pick.randint(2, 5)
    return nn.Sequential(
        nn.Conv2d(3, width, 2, stride=2), Rows(), layer(width, 16), nn.LayerNorm(width), nn.Linear(width, 5)
    )


@pytest.mark.parametrize("seed", range(6))
def test_filters_in_buffers(seed: int) -> None:
    kind, channels = (Blur, BlurOfInput)[seed % 2], random.Random(seed).randint(4, 12)
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), kind(channels), nn.Conv2d(channels, 5, 1))
    check_family(net, picture(3, 10), prunes="0", seed=seed)
    assert net[2].filter.shape[0] == net[0].out_channels
    if kind is Blur:
        assert net[2].channels == net[0].out_channels


def test_groups_of_a_users_own_module() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), OwnDepthwise(8), nn.Conv2d(8, 5, 1))
    check_family(net, picture(3, 10), prunes="0")
    assert net[2].groups == net[0].out_channels < 8


def test_groups_that_are_written_down_keep_their_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Blur(8, groups=8), nn.Conv2d(8, 5, 1))
    stays(net, picture(3, 10), "0", "8 groups written down at test_direct_weights.py")


@pytest.mark.parametrize("seed", range(4))
def test_a_bias_in_pieces(seed: int) -> None:
    check_family(tokens(lambda width, _: BiasInPieces(width, 4), seed), picture(), prunes="0 2", seed=seed)
    width = random.Random(seed).randint(3, 8)
    check_family(nn.Sequential(nn.Conv2d(3, width, 1), ConvWithBiasInPieces(width)), picture(), prunes="0 1", seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_layers_over_positions_let_channels_pass(seed: int) -> None:
    model = tokens(lambda width, n: TokenMixer(width, n, bias=seed % 2 == 0), seed)
    check_family(model, picture(), prunes="0 2.over_channels.0", seed=seed)


def test_layers_over_positions_stay() -> None:
    model = tokens(TokenMixer, 1)
    stays(model, picture(), "2.over_positions.0", "a layer mixes positions")


@pytest.mark.parametrize("seed", range(4))
def test_repeated_tables_and_channels(seed: int) -> None:
    check_family(tokens(Repeated, seed), picture(), prunes="0 2.join", seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_transposed_weights(seed: int) -> None:
    check_family(tokens(lambda width, _: TransposedWeight(width), seed), picture(), prunes="0 2", seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_reductions_with_two_results(seed: int) -> None:
    width = random.Random(seed).randint(4, 12)
    net = nn.Sequential(nn.Conv2d(3, width, 2, stride=2), Rows(), Maxima(), nn.Linear(width, 5))
    check_family(net, picture(), prunes="0", seed=seed)
