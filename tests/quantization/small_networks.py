# SPDX-License-Identifier: Apache-2.0
"""Small networks of different kinds, batches for them, and a training step."""

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer


class Residual(nn.Module):
    """A block whose sum is an activation of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inner + x).relu()


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def vit() -> nn.Module:
    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    # It starts from zeros, and nothing before it would learn at first.
    nn.init.normal_(model.heads.head.weight, std=0.2)
    return model


def swin() -> nn.Module:
    """Its attention hands the weights of qkv and proj to a function."""
    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5, stochastic_depth_prob=0.0)


NETWORKS = {"convolutions": convolutions, "vit": vit, "swin": swin}


def batch(number: int = 4) -> tuple[Tensor, Tensor]:
    """Noise; the label tells where it is bright."""
    x, labels = torch.randn(number, 3, 16, 16), torch.randint(0, 5, (number,))
    for picture, label in zip(x, labels.tolist(), strict=True):
        picture[label % 3, :, 8 * (label // 3) : 8 * (label // 3) + 8] += 3.0
    return x, labels


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    return [batch() for _ in range(number)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One training step; its loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()
