# SPDX-License-Identifier: Apache-2.0
"""Random transformers for the channel algebra: attention, windows, class tokens, gated layers, in random order."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_attention import RandomAttention
from tests.graph.random_networks import randomise

Grid = tuple[int, int]


class Mlp(nn.Module):
    """Two layers with something between them."""

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.way, self.hidden = (
            pick.choice(["plain", "plain", "gated", "halves", "swapped", "norm"]),
            pick.choice([12, 16, 20]),
        )
        twice = 2 if self.way in ("halves", "swapped") else 1
        self.up, self.down = nn.Linear(dim, twice * self.hidden), nn.Linear(self.hidden, dim, bias=pick.random() < 0.5)
        if self.way == "gated":
            self.gate = nn.Linear(dim, self.hidden, bias=False)
        if self.way == "norm":
            self.norm = nn.LayerNorm(self.hidden)
        self.by_number = pick.random() < 0.5

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        y = self.up(x)
        if self.way == "gated":
            y = F.silu(self.gate(x)) * y
        elif self.way == "halves":
            a, b = y.chunk(2, -1) if self.by_number else y.split(self.hidden, dim=-1)
            y = F.gelu(a) * b
        elif self.way == "swapped":
            half = y.shape[-1] // 2
            y = y[..., half:] * y[..., :half].sigmoid()
        elif self.way == "norm":
            y = self.norm(F.gelu(y))
        else:
            y = F.gelu(y)
        return self.down(y)


class Whole(nn.Module):
    """Attention of all tokens."""

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.attention = RandomAttention(pick, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.attention(x)


class Packaged(nn.Module):
    """torch's own layer."""

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 2 if dim % 4 else 4, batch_first=True)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Windows(nn.Module):
    """Attention inside windows of 2 x 2 tokens, or of one token of each quarter; maybe shifted. Tokens before the
    grid pass by.
    """

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.attention = RandomAttention(pick, dim, most=4)
        self.window, self.shift = 2, pick.choice([0, 1])
        self.spread, self.masked = pick.random() < 0.3, pick.random() < 0.5

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        (h, w), (b, n, c), s = grid, x.shape, self.window
        before = n - h * w
        kept, x = x[:, :before], x[:, before:]
        x = x.reshape(b, h, w, c)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        if self.spread:
            x = x.view(b, s, h // s, s, w // s, c).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5)
        count = (h // s) * (w // s)
        mask = None
        if self.masked:
            mask = (torch.arange(count * s**4) % 5 == 0).view(1, count, 1, s * s, s * s).expand(b, -1, -1, -1, -1)
            mask = mask.reshape(b * count, 1, s * s, s * s).to(x.dtype) * -100.0
        x = self.attention(x.reshape(b * count, s * s, c), mask=mask)
        x = x.view(b, h // s, w // s, s, s, c)
        x = x.permute(0, 3, 1, 4, 2, 5) if self.spread else x.permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, h, w, c)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), dims=(1, 2))
        return torch.cat([kept, x.flatten(1, 2)], 1)


class Crossed(nn.Module):
    """Attention to learned tokens, or to a projection of the tokens themselves to another width."""

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(5, 12)) if pick.random() < 0.4 else None
        self.narrow = nn.Linear(dim, 12)
        self.attention = RandomAttention(pick, dim, memory=12)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        memory = self.narrow(x)
        if self.learned is not None:
            memory = torch.cat([memory[:, :3], self.learned.expand(x.shape[0], -1, -1)], 1)
        return self.attention(x, memory)


class Pooled(nn.Module):
    """Tokens as a picture again: a depthwise convolution, channels weighed by the mean."""

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim if pick.random() < 0.6 else 1)
        self.weigh = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        before = x.shape[1] - grid[0] * grid[1]
        b, _, c = x.shape
        first, rest = x.split([before, x.shape[1] - before], 1)
        picture = self.conv(rest.transpose(1, 2).reshape(b, c, *grid)).flatten(2).transpose(1, 2)
        return torch.cat([first, picture], 1) * self.weigh(x.mean(1, keepdim=True)).sigmoid()


BRANCHES: list[type[nn.Module]] = [Mlp, Mlp, Whole, Whole, Whole, Windows, Windows, Crossed, Packaged, Pooled]


class Residual(nn.Module):
    """A branch with a norm before, behind or after the sum, and maybe a scale for each channel."""

    def __init__(self, pick: random.Random, dim: int) -> None:
        super().__init__()
        self.branch = pick.choice(BRANCHES)(pick, dim)
        self.norm = pick.choice([nn.LayerNorm, nn.RMSNorm])(dim)
        self.order = pick.choice(["before", "before", "behind", "after"])
        self.gamma = nn.Parameter(torch.randn(dim)) if pick.random() < 0.3 else None

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        y = self.branch(self.norm(x) if self.order == "before" else x, grid)
        y = self.norm(y) if self.order == "behind" else y
        y = y if self.gamma is None else self.gamma * y
        return self.norm(x + y) if self.order == "after" else x + y


class Merging(nn.Module):
    """Four tokens become one."""

    def __init__(self, pick: random.Random, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x.unflatten(1, grid)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x)).flatten(1, 2)


class RandomTransformer(nn.Module):
    """Patches, tokens and positions, at most ``length`` residual blocks, a head; for pictures of 3 x 8 x 8."""

    def __init__(self, seed: int, length: int = 4) -> None:
        super().__init__()
        pick = random.Random(seed)
        torch.manual_seed(seed)
        dim = pick.choice([12, 16, 24])
        self.stem = pick.choice(["conv", "unfold"])
        self.embed = nn.Conv2d(3, dim, 2, 2) if self.stem == "conv" else nn.Linear(12, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim)) if pick.random() < 0.4 else None
        self.positions = nn.Parameter(torch.randn(1, 16, dim)) if pick.random() < 0.5 else None
        self.blocks = nn.ModuleList()
        for i in range(pick.randint(2, length)):
            if (
                i
                and self.token is None
                and not any(isinstance(b, Merging) for b in self.blocks)
                and pick.random() < 0.2
            ):
                out = pick.choice([12, 16, 24])
                self.blocks.append(Merging(pick, dim, out))
                dim = out
            self.blocks.append(Residual(pick, dim))
        self.norm = nn.LayerNorm(dim) if pick.random() < 0.5 else nn.Identity()
        self.head_kind = pick.choice(["mean", "first", "all", "attention pool"])
        if self.head_kind == "attention pool":
            self.probe = nn.Parameter(torch.randn(1, 2, dim))
            self.pool = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.head = nn.Linear(dim, 5)
        randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        grid = h // 2, w // 2
        if self.stem == "conv":
            x = self.embed(x).flatten(2).transpose(1, 2)
        else:
            patches = x.view(b, 3, grid[0], 2, grid[1], 2).permute(0, 2, 4, 3, 5, 1)
            x = self.embed(patches.reshape(b, grid[0] * grid[1], 12))
        if self.positions is not None:
            x = x + self.positions[:, : x.shape[1]]
        if self.token is not None:
            x = torch.cat([self.token.expand(b, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, grid)
            if isinstance(block, Merging):
                grid = grid[0] // 2, grid[1] // 2
        x = self.norm(x)
        if self.head_kind == "attention pool":
            x = self.pool(self.probe.expand(b, -1, -1), x, x)[0].mean(1)
        elif self.head_kind != "all":
            x = x[:, 0] if self.head_kind == "first" else x.mean(1)
        return self.head(x)

    def other_input(self) -> Tensor:
        """Another batch, and other pixels where that can be."""
        if self.positions is not None or any(isinstance(block, Merging) for block in self.blocks):
            return torch.randn(1, 3, 8, 8)
        return torch.randn(1, 3, 12, 8)
