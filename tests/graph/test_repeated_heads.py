# SPDX-License-Identifier: Apache-2.0
"""Values that repeat one entry along an attribute's size: one head for several queries, biases of zeros."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxslim
from tests.graph.proofs import check_family

X = torch.randn(2, 7, 5)


class OneHead(nn.Module):
    """Several queries share one key and value, repeated by the forward or by torch."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.heads, self.width, self.way = 4, 6, way
        self.q, self.k, self.v = nn.Linear(5, 24), nn.Linear(5, 6), nn.Linear(5, 6)
        self.out, self.head = nn.Linear(24, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.width).transpose(1, 2)
        k, v = (layer(x).view(b, n, 1, self.width).transpose(1, 2) for layer in (self.k, self.v))
        if self.way == "expand":
            k, v = (y[:, :, None].expand(b, 1, self.heads, n, -1).reshape(b, self.heads, n, -1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == "torch")
        return self.head(self.out(y.transpose(1, 2).reshape(b, n, -1)))


class Biased(nn.Module):
    """Scores with a bias that is learned in one layer and zero in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = nn.Linear(5, 24), nn.Linear(5, 24), nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = torch.zeros((1, self.heads, n, n), dtype=x.dtype)
        bias = bias + torch.arange(n, dtype=x.dtype)
        return self.out(((q @ k.transpose(2, 3) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", ["expand", "torch"])
def test_queries_that_share_one_head(way: str) -> None:
    assert "one head is shared by all queries" in fxslim.trace(OneHead(way), X).explain("k")
    model = check_family(OneHead(way), X, prunes="q out", ratio=0.5)
    assert model.q.out_features == model.out.in_features in (6, 12, 18)
    assert model.k.out_features == model.v.out_features == 6


def test_zeros_for_each_head() -> None:
    model = check_family(Biased(), X, prunes="q", ratio=0.5)
    assert model.heads == model.q.out_features // 6 < 4


def test_one_attribute_for_two_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            zeros = [torch.zeros(self.width, dtype=x.dtype) for _ in range(2)]
            a, b = self.a(x).tanh() + zeros[0], self.b(x).tanh() + zeros[1]
            return self.head(a) + self.head(torch.flip(b, [-1]))

    model = Shared()
    graph = fxslim.trace(model, X)
    assert not graph.groups, graph.report()


def test_two_layers_whose_width_one_attribute_says() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.a, self.b, self.c, self.d = (nn.Linear(*s) for s in ((5, 8), (5, 8), (8, 3), (8, 3)))

        def forward(self, x: Tensor) -> Tensor:
            a, b = (layer(x).tanh() + torch.zeros(self.width, dtype=x.dtype) for layer in (self.a, self.b))
            return self.c(a) + self.d(b)

    def first_layer_first(group, model):
        return torch.arange(8) + 8.0 * (group.name == "b")

    model = Two()
    plan = fxslim.plan_pruning(model, X, ratio=0.3, target="channels", importance=first_layer_first)
    assert plan.verify(model, X).ok
    assert plan.apply(model).width == model.a.out_features == model.b.out_features < 8
