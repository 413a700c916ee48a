# SPDX-License-Identifier: Apache-2.0
"""Networks and batches that several tests of sparsity share."""

import torch
from torch import Tensor, nn


def small_net(seed: int = 0) -> nn.Sequential:
    """Convolutions (one grouped), a norm and linear layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10),
    ).eval()  # fmt: skip


def batches(num: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Pictures whose channels are correlated, and their classes."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 8, generator=random)
    return [
        (
            torch.einsum("cd,ndhw->nchw", mix, torch.randn(8, 8, 9, 9, generator=random)),
            torch.randint(0, 10, (8,), generator=random),
        )
        for _ in range(num)
    ]


class HandsOver(nn.Module):
    """Uses a layer's weight by itself, past the layer's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.second.weight, self.second.bias)


class ReadsAttention(nn.Module):
    """Uses a projection of nn.MultiheadAttention by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.attn.in_proj_weight[:8])


class ReadsKept(nn.Module):
    """Uses a layer's weight that ``kept`` holds, whatever the layer's attribute shows by now."""

    kept: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.kept["weight"])


class WindowAttention(nn.Module):
    """Hands the weights of its two layers to a function, as torchvision's Swin does."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self_attention(x, self.heads, self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)


def self_attention(
    x: Tensor, heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor
) -> Tensor:
    """Attention of each place to all of its sequence."""
    qkv = nn.functional.linear(x, qkv_weight, qkv_bias)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return nn.functional.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)


class WindowBlock(nn.Module):
    """Attention and an MLP around a residual stream."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), WindowAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


def window_net(seed: int = 0) -> nn.Sequential:
    """Two blocks and a head, for sequences of 8 features."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), WindowBlock(), WindowBlock(), nn.LayerNorm(16), nn.Linear(16, 8)).eval()
