# SPDX-License-Identifier: Apache-2.0
"""Networks whose channels are moved about, for tests of their order."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graph.random_networks import randomise


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.norm(self.inner(x.relu()))).mean((2, 3)))


class Concat(nn.Module):
    """The second part starts in the middle of a block of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 16, 3)
        self.joined, self.head = nn.Conv2d(26, 8, 1), nn.Linear(8 * 36, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x).relu(), self.b(x).tanh()], 1)
        return self.head(self.joined(x).relu().flatten(1))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=2)
        self.shuffle, self.last, self.head = nn.ChannelShuffle(2), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.shuffle(self.grouped(self.stem(x).relu())).relu()).relu())


class Split(nn.Module):
    """Halves that are one group for pruning and meet again in one layer, but are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.joined, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head(self.joined(torch.cat([a.relu(), b], 1)).relu())


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=16)
        self.norm, self.narrow, self.up = nn.BatchNorm2d(32), nn.Conv2d(32, 8, 1), nn.ConvTranspose2d(8, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.narrow(self.norm(self.deep(self.wide(x).relu()))).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.position = nn.Parameter(torch.randn(1, 8, 16))
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.q, self.kv, self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.embed(x.mean(1)) + self.position)
        q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        return self.head(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Linear(8, 16), nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.hidden, self.head = nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.lstm(self.embed(x.mean(1)).relu())[0]).relu())


NETWORKS = [Residual, Concat, Shuffle, Split, Depthwise, Attention, Recurrent]
PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(kind()).eval()
