# SPDX-License-Identifier: Apache-2.0
"""Random networks for the channel algebra: every kind of layer and join, in random order."""

import random

import torch
from torch import Tensor, nn

from tests.graph.random_views import VIEWS


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Conv2d(channels, max(2, channels // 2), 1),
            nn.Conv2d(max(2, channels // 2), channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class ChannelsLast(nn.Module):
    """A layer that has its channels in the last dim."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RowByRow(nn.Module):
    """Layers over the columns of a feature map, one row after the other."""

    def __init__(self, channels: int, kind: type) -> None:
        super().__init__()
        self.layer = kind(channels, channels // 2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row.transpose(1, 2))[0].transpose(1, 2) for row in x.unbind(2)], 2)


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RandomNetwork(nn.Module):
    """A DAG of at most ``length`` steps; each reads earlier feature maps and makes a new one."""

    def __init__(self, seed: int, length: int = 9) -> None:
        super().__init__()
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleDict()
        self.program: list[tuple] = []
        self.channels = [3]
        self.add("conv", 0)
        for _ in range(length):
            step = self.random.choice(STEPS)
            self.add(step, self.random.randrange(max(0, len(self.channels) - 3), len(self.channels)))
        self.head_kind = self.random.choice(["mean", "flatten", "conv"])
        last = self.channels[-1]
        width = last * 36 if self.head_kind == "flatten" else last
        self.head = nn.Conv2d(last, 5, 1) if self.head_kind == "conv" else nn.Linear(width, 5)
        randomise(self)

    def layer(self, module: nn.Module) -> str:
        name = f"l{len(self.layers)}"
        self.layers[name] = module
        return name

    def add(self, step: str, source: int) -> None:
        c, pick = self.channels[source], self.random.choice
        if step == "conv":
            out = pick([8, 12, 16, 24])
            self.emit(
                ("call", self.layer(nn.Conv2d(c, out, pick([1, 3]), padding="same", bias=pick([True, False]))), source),
                out,
            )
        elif step == "grouped":
            groups = pick([g for g in (1, 2, 3, 4) if c % g == 0])
            out = groups * pick([4, 6])
            self.emit(("call", self.layer(nn.Conv2d(c, out, 3, padding=1, groups=groups)), source), out)
        elif step == "transposed":
            out = pick([8, 12])
            self.emit(("call", self.layer(nn.ConvTranspose2d(c, out, 3, padding=1)), source), out)
        elif step in ONE_TO_ONE:
            self.emit(("call", self.layer(ONE_TO_ONE[step](c)), source), c)
        elif step in ("add", "mul"):
            other = self.random.randrange(len(self.channels))
            project = "" if self.channels[other] == c else self.layer(nn.Conv2d(self.channels[other], c, 1))
            self.emit((step, project, source, other), c)
        elif step == "grouped_transposed":
            groups = pick([g for g in (1, 2, 3, 4) if c % g == 0])
            out = groups * pick([4, 6])
            self.emit(("call", self.layer(nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups)), source), out)
        elif step == "multiplied" and c <= 24:
            self.emit(("call", self.layer(nn.Conv2d(c, 2 * c, 3, padding=1, groups=c)), source), 2 * c)
        elif step == "glu" and c % 2 == 0:
            self.emit(("call", self.layer(nn.GLU(1)), source), c // 2)
        elif step == "pixel_shuffle" and c % 4 == 0:
            layer = nn.Sequential(nn.PixelShuffle(2), nn.AvgPool2d(2))
            self.emit(("call", self.layer(layer), source), c // 4)
        elif step == "recurrent" and c % 2 == 0:
            self.emit(("call", self.layer(RowByRow(c, pick([nn.LSTM, nn.GRU, nn.RNN]))), source), c)
        elif step == "cat":
            other = self.random.randrange(len(self.channels))
            self.emit(("cat", "", source, other), c + self.channels[other])
        elif step in ("chunk_add", "chunk_swap") and c % 2 == 0:
            self.emit((step, "", source), c // 2 if step == "chunk_add" else c)
        elif step == "view" and 4 <= c <= 48:
            view = pick(VIEWS)(c)
            self.emit(("call", self.layer(view), source), view.channels)
        elif step == "shared":
            name = self.layer(nn.Conv2d(c, c, 3, padding=1))
            self.emit(("call", name, source), c)
            self.emit(("call", name, len(self.channels) - 1), c)

    def emit(self, instruction: tuple, channels: int) -> None:
        self.program.append(instruction)
        self.channels.append(channels)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, name, *sources in self.program:
            a = values[sources[0]]
            if kind == "call":
                values.append(self.layers[name](a))
            elif kind in ("add", "mul"):
                b = self.layers[name](values[sources[1]]) if name else values[sources[1]]
                values.append(a + b if kind == "add" else a * torch.sigmoid(b))
            elif kind == "cat":
                values.append(torch.cat([a, values[sources[1]]], 1))
            else:
                first, second = a.chunk(2, 1)
                values.append(first + second if kind == "chunk_add" else torch.cat([second, first], 1))
        last = values[-1]
        if self.head_kind == "mean":
            return self.head(last.mean((2, 3)))
        if self.head_kind == "flatten":
            return self.head(nn.functional.adaptive_avg_pool2d(last, 6).flatten(1))
        return self.head(last)

    def other_input(self) -> Tensor:
        """Another batch, and other pixels where that can be."""
        return torch.randn(2, 3, 8, 8) if self.head_kind == "flatten" else torch.randn(1, 3, 11, 9)


ONE_TO_ONE = {
    "norm": nn.BatchNorm2d,
    "group_norm": lambda c: nn.GroupNorm(2 if c % 2 == 0 else 1, c),
    "layer_norm": ChannelsLastNorm,
    "depthwise": lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c),
    "relu": lambda c: nn.ReLU(inplace=False),
    "prelu": nn.PReLU,
    "pool": lambda c: nn.MaxPool2d(3, 1, 1),
    "squeeze": SqueezeExcite,
    "scale": Scale,
    "instance_norm": lambda c: nn.InstanceNorm2d(c, affine=c % 3 == 0),
    "plain_group_norm": lambda c: nn.GroupNorm(2 if c % 2 == 0 else 1, c, affine=False),
    "rms_norm": lambda c: ChannelsLast(nn.RMSNorm(c, elementwise_affine=c % 3 == 0)),
    "channel_shuffle": lambda c: nn.ChannelShuffle(2 if c % 2 == 0 else 1),
}
STEPS = [
    "conv",
    "conv",
    "conv",
    "grouped",
    "transposed",
    *ONE_TO_ONE,
    "add",
    "add",
    "mul",
    "cat",
    "chunk_add",
    "chunk_swap",
    "shared",
    "view",
    "view",
    "view",
    "grouped_transposed",
    "multiplied",
    "glu",
    "pixel_shuffle",
    "recurrent",
]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm statistics, scales and biases of order 1: a wrong mapping can't hide behind mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, state in [*model.named_parameters(), *model.named_buffers()]:
        if not state.is_floating_point():
            continue
        if name.endswith("running_var"):
            state.data = torch.rand(state.shape, generator=generator) + 0.5
        elif state.dim() <= 1:
            state.data = torch.randn(state.shape, generator=generator) * 0.5 + (1.0 if "weight" in name else 0.0)
    return model
