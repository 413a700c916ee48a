# SPDX-License-Identifier: Apache-2.0
"""Small networks of torch whose forward gives Q and DQ, at the edges of modules as plans put them."""

import warnings

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    dtype = zero_point.dtype
    return torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero_point), dtype=dtype, shape=x.shape)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, **attributes: int) -> Tensor:
    given = (q, scale, zero_point)
    return torch.onnx.ops.symbolic("DequantizeLinear", given, attributes, dtype=torch.float32, shape=q.shape)


class Pair(nn.Module):
    """One grid from ``low`` to ``high``."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        step = (high - low) / 255
        self.register_buffer("scale", torch.tensor(step))
        self.register_buffer("zero_point", torch.tensor(round(-low / step), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return dequantize(quantize(x, self.scale, self.zero_point), self.scale, self.zero_point)


class Layer(nn.Module):
    """A convolution or a linear layer with an int8 weight, one scale per output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight.detach()
        self.register_buffer("scale", weight.flatten(1).abs().amax(1) / 127)
        self.register_buffer("zero_point", torch.zeros(len(weight), dtype=torch.int8))
        steps = weight / self.scale.view(-1, *[1] * (weight.dim() - 1))
        self.register_buffer("integers", steps.round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(self.integers, self.scale, self.zero_point, axis=0)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        layer = self.layer
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def conv(inputs: int, outputs: int, size: int = 3, **settings: int) -> Layer:
    return Layer(nn.Conv2d(inputs, outputs, size, padding=size // 2, **settings))


class ResidualNet(nn.Module):
    """A pool behind the first layer, a residual sum, a join of two layers, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.pooled, self.inner = Pair(-3, 3), Pair(0, 2), Pair(0, 2)
        self.outer, self.added, self.joined = Pair(-2, 2), Pair(0, 3), Pair(0, 3)
        self.averaged, self.result = Pair(0, 1), Pair(-1, 1)
        self.first, self.second, self.third = conv(3, 16, stride=2), conv(16, 16), conv(16, 16)
        self.left, self.right, self.last = conv(16, 32), conv(16, 32, 1), Layer(nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pooled(F.max_pool2d(self.first(self.given(x)).relu(), 3, 2, 1))
        y = self.outer(self.third(self.inner(self.second(x).relu())))
        x = self.added((x + y).relu())
        x = self.joined(torch.cat([self.left(x).relu(), self.right(x).relu()], 1))
        x = self.averaged(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return self.result(self.last(x))


class ShuffledNet(nn.Module):
    """Depthwise layers, ReLU6 on grids narrower and wider than it, halves, a channel shuffle, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.narrow, self.wide, self.outer = Pair(-3, 3), Pair(0, 5), Pair(0, 6.5), Pair(-3, 3)
        self.added, self.side, self.shuffled, self.averaged = Pair(-4, 4), Pair(0, 4), Pair(-4, 4), Pair(-1, 2)
        self.first, self.deep = conv(3, 16, stride=2), conv(16, 16, groups=16)
        self.flat, self.part, self.last = conv(16, 16, 1), conv(8, 8), Layer(nn.Linear(16, 10))
        self.result = Pair(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(F.relu6(self.first(self.given(x))))
        x = self.added(x + self.outer(self.flat(self.wide(F.relu6(self.deep(x))))))
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.side(F.relu6(self.part(right)))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.shuffled(F.interpolate(x, scale_factor=2))
        return self.result(self.last(self.averaged(x.mean([2, 3]))))


class SequenceNet(nn.Module):
    """Linear layers on sequences, with a norm that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.inner, self.outer, self.normed = Pair(-3, 3), Pair(-2, 2), Pair(-2, 2), Pair(-3, 3)
        self.first, self.second = Layer(nn.Linear(16, 32)), Layer(nn.Linear(32, 16))
        self.third, self.last = Layer(nn.Linear(16, 16, bias=False)), Layer(nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(self.second(self.inner(self.first(self.given(x)))))
        return self.last(self.normed(F.layer_norm(self.third(x), (16,))))


def exported(network: nn.Module, x: Tensor) -> ir.Model:
    """What torch writes, before any pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(network.eval(), (x,), dynamo=True, verbose=False).model
