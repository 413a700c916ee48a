# SPDX-License-Identifier: Apache-2.0
"""Heads that share a convolution or a table get narrower together; biases and position tables that a forward makes."""

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.pruning.verification import TOLERANCE
from tests.graph.proofs import check_family

X = torch.randn(2, 16, 8)


class PooledAttention(nn.Module):
    """Queries, keys and values of all heads pass one convolution each, beside a first token."""

    def __init__(self, dim: int, heads: int, pools: str, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width, self.pools = heads, dim // heads, dim, pools
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(8, 3 * dim) if fused else nn.ModuleList(nn.Linear(8, dim) for _ in range(3))
        width = self.head_dim
        for name in pools:
            conv = nn.Conv2d(width, width, 3, 2 if name in "kv" else 1, 1, groups=width if name != "q" else 1)
            self.add_module(f"pool_{name}", conv)
            self.add_module(f"norm_{name}", nn.LayerNorm(width))
        self.rows = nn.Parameter(torch.randn(5, width))
        self.out = nn.Linear(dim, 5)

    def pool(self, x: Tensor, name: str) -> Tensor:
        if name not in self.pools:
            return x
        token, rest = torch.tensor_split(x, indices=(1,), dim=2)
        b, h, n, d = rest.shape
        side = int(n**0.5)
        rest = rest.transpose(2, 3).reshape(b * h, d, side, side)
        rest = getattr(self, f"pool_{name}")(rest).reshape(b, h, d, -1).transpose(2, 3)
        return getattr(self, f"norm_{name}")(torch.cat([token, rest], 2))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        if isinstance(self.qkv, nn.Linear):
            parts = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).transpose(1, 3).unbind(2)
        else:
            parts = tuple(f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in self.qkv)
        q, k, v = (self.pool(part, name) for part, name in zip(parts, "qkv", strict=True))
        scores = (self.scale * q) @ k.transpose(2, 3)
        near = torch.einsum("bhnc,kc->bhnk", q, self.rows)
        scores = scores + near[..., torch.arange(k.shape[2]) % 5]
        x = (scores.softmax(-1) @ v + q).transpose(1, 2).reshape(b, -1, self.width)
        return self.out(x.mean(1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "pools"), [(2, "qkv"), (4, "kv"), (2, "q"), (1, "kv")])
def test_heads_that_share_a_convolution_get_narrower(heads: int, pools: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = PooledAttention(16, heads, pools, fused=seed % 2 == 0)
    graph = fxslim.trace(model, torch.randn(2, 17, 8))
    assert set(graph.frozen_layers()) == {"out"}, graph.report()
    pruned = check_family(model, torch.randn(2, 17, 8), ratio=0.3, seed=seed)
    assert pruned.head_dim < 16 // heads
    assert pruned.num_heads == heads


class MadeBias(nn.Module):
    """The key part of a bias is set to 0 in the forward."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.num_heads = way, 4
        self.embed, self.qkv, self.out = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 5)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def bias(self) -> Tensor:
        if self.way == "parts":
            return torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        return bias

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = self.embed(x)
        qkv = nn.functional.linear(x, self.qkv.weight, self.bias())
        q, k, v = qkv.reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        return self.out(((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


@pytest.mark.parametrize("way", ["parts", "in place"])
def test_a_bias_that_the_forward_makes_follows(way: str) -> None:
    check_family(MadeBias(way), X, prunes="embed qkv", ratio=0.3)


class MadeTable(nn.Module):
    """A table of positions is made from one for rows and one for columns, by their own sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 12), nn.Linear(12, 3)
        self.rows, self.columns = nn.Parameter(torch.randn(4, 12)), nn.Parameter(torch.randn(4, 12))

    def forward(self, x: Tensor) -> Tensor:
        count, width = self.columns.shape
        table = torch.repeat_interleave(self.rows, count, dim=0)
        table = table + self.columns.unsqueeze(0).expand(4, -1, -1).reshape(-1, width)
        return self.head(self.embed(x) + table)


def test_a_table_of_positions_made_of_two() -> None:
    pruned = check_family(MadeTable(), X, prunes="embed")
    assert pruned.rows.shape[1] == pruned.columns.shape[1] < 12


def test_a_number_of_elements_is_a_size() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            half = self.a.bias.numel() // 2
            x = self.a(x)
            return self.b(x[..., :half] * x[..., half:])

    model = Halves()
    check_family(model, X, prunes="a")
    assert fxslim.plan_pruning(Halves(), X, ratio=0.4, importance="random").verify(Halves(), X).relative <= TOLERANCE
