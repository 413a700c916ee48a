# SPDX-License-Identifier: Apache-2.0
"""Attention for random networks: ways to make queries, keys and values, to multiply them, to mask and to scale."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPLITS = ["fused", "interleaved", "chunk", "split", "separate", "grouped", "expanded", "query rows", "one key head"]
PRODUCTS = ["matmul", "einsum", "sdpa", "bmm"]
EXTRAS = ["rotary half", "rotary pairs", "key norm", "cosine", "talking heads", "no key bias"]
BIASES = ["causal", "filled", "mask", "distances", "per head"]


class RelativeTable(nn.Module):
    """A learned bias for each pair of positions and head, looked up, or made from distances by a small network."""

    def __init__(self, heads: int, most: int, made: bool) -> None:
        super().__init__()
        self.most, self.made = most, made
        if made:
            self.network = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, heads, bias=False))
        else:
            self.table = nn.Parameter(torch.randn(2 * most - 1, heads))

    def forward(self, queries: int, keys: int) -> Tensor:
        places = (torch.arange(queries)[:, None] - torch.arange(keys)).clamp(1 - self.most, self.most - 1)
        if self.made:
            near = torch.linspace(-1, 1, 2 * self.most - 1)[:, None]
            table = 4 * torch.sigmoid(self.network(near.to(next(self.parameters()).dtype)))
        else:
            table = self.table
        index = places + self.most - 1
        return table[index.reshape(-1)].view(queries, keys, -1).permute(2, 0, 1).contiguous()[None]


class RandomAttention(nn.Module):
    """Attention of a sequence to itself, or to ``memory`` channels of another."""

    def __init__(self, pick: random.Random, dim: int, memory: int = 0, most: int = 36) -> None:
        super().__init__()
        self.split_way = pick.choice([s for s in SPLITS if s in ("separate", "grouped", "expanded") or not memory])
        self.product, self.extra = pick.choice(PRODUCTS), pick.choice([*EXTRAS, *[""] * 4])
        self.bias_kind, self.sizes = pick.choice([*BIASES, *[""] * 3]), pick.choice(["own", "attribute", "inferred"])
        self.dim = dim
        shared = self.split_way in ("grouped", "expanded", "query rows")
        self.num_heads = pick.choice([h for h in (2, 4, 6) if dim % h == 0 and (h > 2 or not shared)])
        self.head_dim = dim // self.num_heads if pick.random() < 0.7 else 6
        self.kv_heads = self.num_heads // 2 if shared else self.num_heads
        self.kv_heads = 1 if self.split_way == "one key head" else self.kv_heads
        self.scale, width = self.head_dim**-0.5, self.num_heads * self.head_dim
        self.width, narrow, bias = width, self.kv_heads * self.head_dim, pick.random() < 0.7
        if self.split_way in ("fused", "interleaved", "chunk", "split"):
            self.qkv = nn.Linear(dim, 3 * width, bias=bias)
        else:
            self.q = nn.Linear(dim, width, bias=bias)
            self.k, self.v = nn.Linear(memory or dim, narrow), nn.Linear(memory or dim, narrow, bias=bias)
        self.out = nn.Linear(width, dim)
        self.most = most
        if self.bias_kind == "distances":
            self.table = RelativeTable(self.num_heads, most, made=pick.random() < 0.5)
        if self.bias_kind == "per head":
            self.register_buffer("slopes", -torch.rand(self.num_heads, 1, 1))
        if self.extra == "key norm":
            self.norm = pick.choice([nn.LayerNorm, nn.RMSNorm])(self.head_dim)
        if self.extra == "cosine":
            self.logit_scale = nn.Parameter(torch.randn(self.num_heads, 1, 1))
        if self.extra == "talking heads":
            self.talk = nn.Linear(self.num_heads, self.num_heads)
        if self.extra == "no key bias" and self.split_way in ("fused", "chunk", "split") and bias:
            self.drop_bias = True

    def heads(self, x: Tensor, count: int) -> Tensor:
        """(batch, positions, heads * width) as (batch, heads, positions, width)."""
        b, n, c = x.shape
        if self.sizes == "own":
            x = x.view(b, n, c // self.head_dim, self.head_dim)
        elif self.sizes == "attribute":
            x = x.view(b, n, count, self.head_dim)
        else:
            x = x.unflatten(-1, (count, -1))
        return x.transpose(1, 2)

    def fused(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, _ = x.shape
        bias = self.qkv.bias
        if getattr(self, "drop_bias", False):
            bias = bias.clone()
            length = bias.numel() // 3
            bias[length : 2 * length].zero_()
        qkv = F.linear(x, self.qkv.weight, bias) if self.extra == "no key bias" else self.qkv(x)
        if self.split_way == "fused":
            sizes = (3, self.num_heads, -1 if self.sizes == "inferred" else self.head_dim)
            return qkv.reshape(b, n, *sizes).permute(2, 0, 3, 1, 4).unbind(0)
        if self.split_way == "interleaved":
            qkv = qkv.view(b, n, self.num_heads, 3 * self.head_dim).transpose(1, 2)
            return qkv.chunk(3, -1) if self.sizes == "own" else qkv.split(self.head_dim, -1)
        parts = qkv.chunk(3, dim=-1) if self.split_way == "chunk" else qkv.split(self.width, dim=2)
        return tuple(self.heads(part, self.num_heads) for part in parts)

    def spread(self, x: Tensor) -> Tensor:
        """Key or value heads, each as often as it is asked."""
        b, heads, n, width = x.shape
        repeats = self.num_heads // self.kv_heads
        if self.split_way == "grouped":
            return x.repeat_interleave(repeats, dim=1)
        if self.split_way == "expanded":
            return x[:, :, None].expand(b, heads, repeats, n, width).reshape(b, heads * repeats, n, width)
        return x

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        if hasattr(self, "qkv"):
            q, k, v = self.fused(x)
        else:
            source = x if memory is None else memory
            q = self.heads(self.q(x), self.num_heads)
            k, v = (self.spread(self.heads(layer(source), self.kv_heads)) for layer in (self.k, self.v))
        q, k = self.turned(q, k)
        if self.split_way == "query rows":
            # Queries of one key head lie side by side: five dims.
            repeats = self.num_heads // self.kv_heads
            q = q.reshape(b, self.kv_heads, repeats, n, self.head_dim)
            mixed = self.attend(q, k[:, :, None], v[:, :, None], None).flatten(1, 2)
        else:
            mixed = self.attend(q, k, v, mask)
        return self.out(mixed.transpose(1, 2).reshape(b, n, -1))

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.extra.startswith("rotary") and self.head_dim % 2 == 0:
            turn = _turned_halves if self.extra == "rotary half" else _turned_pairs
            return turn(q), turn(k)
        if self.extra == "key norm":
            return q, self.norm(k)
        if self.extra == "cosine":
            return F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.bias(q.shape[-2], k.shape[-2], q.dim() == 4)
        bias = bias if mask is None else mask if bias is None else bias + mask
        plain = self.extra not in ("talking heads", "cosine") and q.dim() == 4
        if self.product == "sdpa" and plain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if self.product == "bmm" and plain and q.shape[1] == k.shape[1]:
            b, h, n, d = q.shape
            scores = torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, -1, d).transpose(1, 2)).view(b, h, n, -1)
            scores = scores * self.scale if bias is None else scores * self.scale + bias
            return torch.bmm(scores.softmax(-1).view(b * h, n, -1), v.reshape(b * h, -1, d)).view(b, h, n, d)
        if self.product == "einsum" and plain and q.shape[1] == k.shape[1]:
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(self.scale)
        else:
            scores = q @ k.transpose(-2, -1)
            scores = scores * (self.logit_scale.exp() if self.extra == "cosine" and q.dim() == 4 else self.scale)
        scores = (scores if bias is None else scores + bias).softmax(-1)
        if self.extra == "talking heads" and q.dim() == 4:
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.product == "einsum" and plain and q.shape[1] == k.shape[1]:
            return torch.einsum("bhnm,bhmd->bhnd", scores, v)
        return scores @ v

    def bias(self, n: int, m: int, plain: bool) -> Tensor | None:
        like = self.out.weight
        if self.bias_kind == "causal":
            return torch.full((n, m), -1e4, dtype=like.dtype).triu(1)
        if self.bias_kind == "filled":
            return torch.zeros(n, m, dtype=like.dtype).masked_fill(torch.ones(n, m).tril().logical_not(), -1e4)
        if self.bias_kind == "mask":
            return (torch.arange(n * m).view(1, 1, n, m) % 3 - 1).to(like.dtype)
        if self.bias_kind == "distances" and plain:
            return self.table(n, m)
        if self.bias_kind == "per head" and plain:
            return self.slopes * (torch.arange(n)[:, None] - torch.arange(m)).abs().to(like.dtype)
        return None


def _angles(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(x.shape[-2])[:, None] / (1.0 + torch.arange(count))
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _turned_halves(x: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], -1) for part in _angles(x, x.shape[-1] // 2))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _turned_pairs(x: Tensor) -> Tensor:
    cos, sin = _angles(x, x.shape[-1] // 2)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
