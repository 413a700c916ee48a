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
