# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights are computed stay, by name and with what to do; without them the model can be pruned."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxslim
from fxslim import UnsupportedLayerError
from tests.graph.proofs import check_family, picture, stays


def hooked(name: str) -> Callable[[nn.Module], nn.Module]:
    def register(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(nn.utils, name)(layer)

    return register


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def remove_parametrization(layer: nn.Module) -> None:
    parametrize.remove_parametrizations(layer, "weight")


KINDS = {
    "spectral norm": (
        hooked("spectral_norm"), "call torch.nn.utils.remove_spectral_norm on body.1", nn.utils.remove_spectral_norm,
    ),
    "masked": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "call torch.nn.utils.prune.remove on body.1",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "parametrized spectral norm": (
        parametrizations.spectral_norm, "is made by _SpectralNorm: call torch.nn.utils.parametrize",
        remove_parametrization,
    ),
    "orthogonal": (parametrizations.orthogonal, "is made by _Orthogonal: call", remove_parametrization),
    "one of the user's": (doubled, "is made by Doubled: call", remove_parametrization),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        ends = (
            (nn.Conv2d(3, 8, 1), nn.Conv2d(12, 8, 1))
            if isinstance(layer, nn.Conv2d)
            else (nn.Linear(3, 8), nn.Linear(12, 8))
        )
        self.body, self.head = (
            nn.Sequential(ends[0], layer, nn.Tanh(), ends[1]),
            type(ends[0])(8, 4, *[1] * (layer.__class__ is nn.Conv2d)),
        )

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "build", [lambda bias: nn.Conv2d(8, 12, 3, bias=bias), lambda bias: nn.Linear(8, 12, bias=bias)]
)
def test_stays_by_name(name: str, bias: bool, build: Callable) -> None:
    register, match, remove = KINDS[name]
    layer = build(bias)
    x = picture() if isinstance(layer, nn.Conv2d) else torch.randn(2, 5, 3)
    model = Net(layer)
    register(layer)
    stays(model, x, "body.1", match)
    remove(layer)
    check_family(model, x, prunes="body.0 body.1", ratio=0.2)


def test_recurrent_layers_with_computed_weights_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.cell, self.b, self.c = nn.Linear(5, 8), nn.GRUCell(8, 8), nn.Linear(8, 9), nn.Linear(9, 3)
            parametrizations.weight_norm(self.cell, "weight_hh")

        def forward(self, x):
            return self.c(torch.tanh(self.b(self.cell(self.a(x)))))

    stays(Net(), torch.randn(2, 5), "cell", "cell.weight_hh is made by _WeightNorm")


def test_lazy_layers_are_refused_until_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyConv2d(12, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(4, 1))
    with pytest.raises(
        UnsupportedLayerError, match=r"^0: 0\.weight has no shape yet, since it is lazy: call the model once"
    ):
        fxslim.plan_pruning(model, picture())
    model(picture())
    check_family(model, picture(), prunes="0")
