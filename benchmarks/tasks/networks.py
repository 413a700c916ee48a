# SPDX-License-Identifier: Apache-2.0
"""Networks for 3x32x32 images, of a few million macs, and wider ones: ``NETWORKS[name]()``."""

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.tasks.glyphs import CLASSES


def _conv_norm(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_conv_norm(inputs, outputs, 3, stride=stride), nn.ReLU(), *_conv_norm(outputs, outputs, 3)
        )
        straight = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if straight else nn.Sequential(*_conv_norm(inputs, outputs, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int = 4) -> None:
        super().__init__()
        wide = inputs * widening
        self.branch = nn.Sequential(
            *_conv_norm(inputs, wide, 1),
            nn.ReLU6(),
            *_conv_norm(wide, wide, 3, stride=stride, groups=wide),
            nn.ReLU6(),
            *_conv_norm(wide, outputs, 1),
        )
        self.straight = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.straight else self.branch(x)


class Attention(nn.Module):
    """Self-attention, written out, with a layer each for queries, keys and values (Torch-Pruning reads no other)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, _ = x.shape
        queries, keys, values = (
            layer(x).reshape(images, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
        return self.project(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first_norm(x))
        return x + self.mlp(self.second_norm(x))


class VisionTransformer(nn.Module):
    """A token for each 4x4 pixels, made by two convolutions; the mean of all tokens is classified."""

    def __init__(self, width: int = 48, num_heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        # From linear patches, as in the first ViTs, it is still at chance after 1,172 steps.
        self.patches = nn.Sequential(
            *_conv_norm(3, width // 2, 3, stride=2),
            nn.ReLU(),
            *_conv_norm(width // 2, width, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )
        self.positions = nn.Parameter(torch.randn(1, 64, width) * 0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _classifier(layers: list[nn.Module], width: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            body=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
            head=nn.Linear(width, len(CLASSES)),
        )
    )  # fmt: skip


def residual_network(width: int) -> nn.Module:
    layers = [*_conv_norm(3, width, 3, stride=2), nn.ReLU(), Residual(width, width, 1), Residual(width, 2 * width, 2)]
    layers += [Residual(2 * width, 2 * width, 1), Residual(2 * width, 4 * width, 2), Residual(4 * width, 4 * width, 1)]
    return _classifier(layers, 4 * width)


def mobile_network(width: int) -> nn.Module:
    layers = [*_conv_norm(3, width, 3, stride=2), nn.ReLU6(), InvertedResidual(width, width, 1)]
    layers += [InvertedResidual(width, 2 * width, 2), InvertedResidual(2 * width, 2 * width, 1)]
    layers += [InvertedResidual(2 * width, 3 * width, 2), InvertedResidual(3 * width, 3 * width, 1)]
    return _classifier([*layers, *_conv_norm(3 * width, 8 * width, 1), nn.ReLU6()], 8 * width)


# The wide ones have channels to spare: what compression is for.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": functools.partial(residual_network, 16),
    "mobilenet": functools.partial(mobile_network, 16),
    "vit": VisionTransformer,
    "wide_resnet": functools.partial(residual_network, 48),
    "wide_mobilenet": functools.partial(mobile_network, 24),
}
