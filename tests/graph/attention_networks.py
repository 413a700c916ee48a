# SPDX-License-Identifier: Apache-2.0
"""Attention whose scale is computed from a width, one head for all queries, correlations of two images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = ["math", "power", "tensor", "default", "attribute"]
SHARED = ["view", "split", "fused", "einsum", "merged", "expanded"]


class ScaledAttention(nn.Module):
    """Queries, keys and values from one layer or three; the scale is read from the queries."""

    def __init__(self, scale: str, heads: int = 2, width: int = 8, *, fused: bool = True) -> None:
        super().__init__()
        self.scale, self.heads, self.width, dim = scale, heads, width, heads * width
        self.embed = nn.Linear(8, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 3 * dim)] if fused else [nn.Linear(12, dim) for _ in range(3)])
        self.out, self.head = nn.Linear(dim, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        parts = self.layers[0](x).chunk(3, -1) if len(self.layers) == 1 else [layer(x) for layer in self.layers]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if self.scale == "default":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (self.scaled(q @ k.transpose(-2, -1), q)).softmax(-1) @ v
        return self.head(self.out(y.transpose(1, 2).flatten(2)).mean(1))

    def scaled(self, scores: Tensor, q: Tensor) -> Tensor:
        if self.scale == "math":
            return scores / math.sqrt(q.size(-1))
        if self.scale == "power":
            return q.shape[-1] ** -0.5 * scores
        if self.scale == "tensor":
            return scores / torch.sqrt(torch.tensor(q.shape[-1]))
        return scores * self.width**-0.5


class SharedHead(nn.Module):
    """Multi-query attention: one head of keys and values for all heads of queries."""

    def __init__(self, way: str, heads: int = 4, width: int = 6) -> None:
        super().__init__()
        self.way, self.heads, self.width, dim = way, heads, width, heads * width
        self.embed, self.head, self.proj = nn.Linear(8, 12), nn.Linear(12, 5), nn.Linear(dim, 12)
        if way == "fused":
            self.qkv = nn.Linear(12, dim + 2 * width)
        else:
            self.q, self.k, self.v = nn.Linear(12, dim), nn.Linear(12, width), nn.Linear(12, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.way == "fused":
            q, k, v = self.qkv(x).split([self.heads * self.width, self.width, self.width], -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        return q.view(*x.shape[:2], self.heads, self.width).transpose(1, 2), k, v

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        (q, k, v), (b, n, _) = self.split(x), x.shape
        root = math.sqrt(k.shape[-1])
        if self.way == "einsum":
            scores = (torch.einsum("bhnd,bmd->bhnm", q, k) / root).softmax(-1)
            y = torch.einsum("bhnm,bmd->bhnd", scores, v)
        elif self.way == "merged":
            scores = (q.reshape(b, self.heads * n, self.width) @ k.transpose(1, 2) / root).softmax(-1)
            y = (scores @ v).view(b, self.heads, n, self.width)
        elif self.way == "expanded":
            k, v = (t[:, None].expand(b, self.heads, n, self.width) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            k, v = (t.view(b, n, 1, self.width).transpose(1, 2) if self.way == "view" else t[:, None] for t in (k, v))
            y = (q @ k.transpose(-2, -1) / root).softmax(-1) @ v
        return self.head(self.proj(y.transpose(1, 2).flatten(2)).mean(1))


class Correlation(nn.Module):
    """Every pixel of one image times every pixel of another, both from one encoder, as in optical flow."""

    def __init__(self, channels: int = 12, *, joined: bool = True) -> None:
        super().__init__()
        self.joined = joined
        self.first, self.last = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, channels, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.joined:
            left, right = self.encode(torch.cat([a, b])).chunk(2)
        else:
            left, right = self.encode(a), self.encode(b)
        corr = left.flatten(2).transpose(1, 2) @ right.flatten(2)
        corr = corr / torch.sqrt(torch.tensor(left.shape[1]))
        return self.head(corr.view(len(a), *a.shape[2:], 16).permute(0, 3, 1, 2).tanh())
