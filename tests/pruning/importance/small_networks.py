# SPDX-License-Identifier: Apache-2.0
"""Networks whose groups are written down by hand: which entries of which weights belong to each channel."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.random_networks import randomise


@dataclass(frozen=True, kw_only=True)
class Place:
    """A layer of a group: its role, and for each channel the entries that are its own."""

    layer: str
    role: str
    entries: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, inputs, targets, and the places of each group."""

    model: nn.Module
    x: Tensor
    target: Tensor
    groups: dict[str, list[Place]]

    @property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Two batches, of 3 and of 2."""
        return [(self.x[:3], self.target[:3]), (self.x[3:], self.target[3:])]


def slice_of(module: nn.Module, role: str, entry: int) -> tuple:
    """The index of the part of a layer's weight that makes (or reads) one entry."""
    if role in ("producer", "depthwise"):
        return (entry,)
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return (slice(None), entry)
    rows, columns = module.weight.shape[0] // groups, module.weight.shape[1]
    block = entry // columns
    return (slice(block * rows, (block + 1) * rows), entry % columns)


def _each(start: int, count: int) -> list[list[int]]:
    return [[i] for i in range(start, start + count)]


def _makes(layer: str, count: int) -> Place:
    return Place(layer=layer, role="producer", entries=_each(0, count))


def _reads(layer: str, count: int, start: int = 0) -> Place:
    return Place(layer=layer, role="consumer", entries=_each(start, count))


def plain() -> Case:
    """Convolutions with batch norms, a flattened map, linear layers."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 4, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    flat = Place(layer="7", role="consumer", entries=[[4 * c + i for i in range(4)] for c in range(4)])
    groups = {
        "0": [_makes("0", 6), _reads("3", 6)],
        "3": [_makes("3", 4), flat],
        "7": [_makes("7", 5), _reads("9", 5)],
    }
    return _case(model, torch.randn(5, 2, 6, 6), groups)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.down(F.relu(self.up(x))))).mean((2, 3))


def residual() -> Case:
    groups = {
        "stem": [_makes("stem", 6), _makes("down", 6), _reads("up", 6), _reads("head", 6)],
        "up": [_makes("up", 5), _reads("down", 5)],
    }
    return _case(Residual(), torch.randn(5, 2, 5, 5), groups)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 6, 3), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3))


def concatenated() -> Case:
    groups = {"a": [_makes("a", 4), _reads("head", 4)], "b": [_makes("b", 6), _reads("head", 6, start=4)]}
    return _case(Concatenated(), torch.randn(5, 2, 5, 5), groups)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.each = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.each(F.relu(self.up(x))))).mean((2, 3))


def depthwise() -> Case:
    each = Place(layer="each", role="depthwise", entries=_each(0, 6))
    return _case(Depthwise(), torch.randn(5, 2, 5, 5), {"up": [_makes("up", 6), each, _reads("head", 6)]})


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 3, groups=2)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.middle(F.relu(self.first(x))))).mean((2, 3))


def grouped() -> Case:
    groups = {"first": [_makes("first", 6), _reads("middle", 6)], "middle": [_makes("middle", 4), _reads("head", 4)]}
    return _case(Grouped(), torch.randn(5, 2, 5, 5), groups)


class Attention(nn.Module):
    """Three heads of four entries, and two layers behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.qkv, self.proj, self.up, self.head = nn.Linear(6, 36), nn.Linear(12, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.relu(self.up(self.proj(y)))).mean(1)


def attention() -> Case:
    """A head is a class: its rows of queries, keys and values, its columns of the layer behind."""
    inside = [[4 * head + i for i in range(4)] for head in range(3)]
    qkv = Place(layer="qkv", role="producer", entries=[[12 * p + i for p in range(3) for i in own] for own in inside])
    groups = {
        "qkv": [qkv, Place(layer="proj", role="consumer", entries=inside)],
        "proj": [_makes("proj", 6), _reads("up", 6)],
        "up": [_makes("up", 7), _reads("head", 7)],
    }
    return _case(Attention(), torch.randn(5, 8, 6), groups)


def _case(model: nn.Module, x: Tensor, groups: dict[str, list[Place]]) -> Case:
    # In float64, so that loops and batches may add up in another order.
    return Case(model=randomise(model).eval().double(), x=x.double(), target=torch.randint(3, (5,)), groups=groups)


CASES = {
    case.__name__: case for case in (plain, residual, concatenated, depthwise, grouped, attention)
}  # fmt: skip
