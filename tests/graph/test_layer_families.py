# SPDX-License-Identifier: Apache-2.0
"""Tables, bilinear layers, gates, pools, blocks of channels, parameters used directly, shared and tied layers."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

import fxslim
from tests.graph.proofs import Rows, check_family, picture, randomise, stays


def between(*middle: nn.Module, channels: int = 12, made: int | None = None) -> nn.Sequential:
    """conv, the layers, conv; the layers make ``made`` channels of ``channels``."""
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *middle, nn.Conv2d(made or channels, 4, 3, padding=1))


class Calling(nn.Module):
    """A module that calls a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def unpooled(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(torch.sigmoid(y), places, 2)


KEEPING = {
    "prelu": lambda: [nn.PReLU(12)],
    "prelu of one": lambda: [nn.PReLU()],
    "softmax over rows": lambda: [nn.Softmax(dim=2)],
    "softmax over pixels": lambda: [nn.Flatten(2), nn.Softmax(-1), nn.Unflatten(2, (8, 8))],
    "max unpool": lambda: [Calling(unpooled)],
    "upsample nearest": lambda: [nn.Upsample(scale_factor=2)],
    "upsample bilinear": lambda: [nn.Upsample(scale_factor=2, mode="bilinear")],
    "upsample bicubic": lambda: [nn.Upsample(size=(5, 7), mode="bicubic")],
    "adaptive max pool": lambda: [nn.AdaptiveMaxPool2d(4)],
    "fractional max pool": lambda: [nn.LPPool2d(2, 2)],
    "dropout": lambda: [nn.Dropout2d()],
    "squeeze and excite": lambda: [SqueezeExcitation(12, 6)],
    "squeeze and excite, hard": lambda: [SqueezeExcitation(12, 4, scale_activation=nn.Hardsigmoid)],
    "zero pad": lambda: [nn.ZeroPad2d((1, 2, 0, 1))],
    "reflection pad": lambda: [nn.ReflectionPad2d(1)],
}


@pytest.mark.parametrize("name", KEEPING)
def test_channels_stay_what_they_are(name: str) -> None:
    check_family(between(*KEEPING[name]()), picture(), prunes="0")


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_upsampling_in_one_and_three_dims(mode: str) -> None:
    flat = nn.Sequential(nn.Conv1d(3, 12, 3), nn.Upsample(scale_factor=2, mode=mode), nn.Conv1d(12, 4, 3))
    check_family(flat, torch.randn(2, 3, 9), prunes="0")
    mode = "trilinear" if mode == "linear" else mode
    deep = nn.Sequential(nn.Conv3d(3, 12, 3), nn.Upsample(scale_factor=2, mode=mode), nn.Conv3d(12, 4, 3))
    check_family(deep, torch.randn(2, 3, 5, 5, 5), prunes="0")


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_gated_linear_units(dim: int) -> None:
    made = 6 if dim == 1 else 12
    check_family(between(nn.GLU(dim), made=made), picture(), prunes="0")


def test_gated_linear_unit_of_rows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), Rows(), nn.Linear(12, 20), nn.GLU(), nn.Linear(10, 4))
    check_family(model, picture(), prunes="0 2")
    assert model[2].out_features == 2 * model[4].in_features < 20


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle(factor: int) -> None:
    channels = 5 * factor**2
    model = between(nn.ReLU(), nn.PixelShuffle(factor), channels=channels, made=5)
    check_family(model, picture(), prunes="0", ratio=0.5)
    assert model[0].out_channels == factor**2 * model[-1].in_channels < channels


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_unshuffle(factor: int) -> None:
    model = between(nn.PixelUnshuffle(factor), made=12 * factor**2)
    check_family(model, picture(), prunes="0")
    check_family(between(nn.PixelUnshuffle(2), nn.PixelShuffle(2)), picture()[0], prunes="0")


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_channel_shuffle(groups: int) -> None:
    model = between(nn.ChannelShuffle(groups), nn.Conv2d(12, 8, 3), made=8)
    check_family(model, picture(), prunes="0 2")
    assert model[0].out_channels % groups == 0


def test_channel_shuffle_between_grouped_convolutions() -> None:
    model = between(nn.Conv2d(12, 12, 1, groups=2), nn.ChannelShuffle(2), nn.Conv2d(12, 24, 3, groups=2), made=24)
    check_family(model, picture(), prunes="0 1 3")


@pytest.mark.parametrize("seed", range(4))
def test_unfold_and_fold(seed: int) -> None:
    pick = random.Random(seed)
    kernel, stride = pick.choice([(2, 2), (2, 3), (3, 3)]), pick.choice([1, 2])
    unfold, fold = nn.Unfold(kernel, stride=stride), nn.Fold((9, 9), kernel, stride=stride)
    check_family(between(unfold, nn.Tanh(), fold), picture(size=9), prunes="0", seed=seed)
    size = 12 * kernel[0] * kernel[1]
    alone = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), unfold, nn.Conv1d(size, 10, 1), nn.ReLU(), nn.Conv1d(10, 2, 1)
    )
    check_family(alone, picture(size=9), prunes="0 2", seed=seed)


class Words(nn.Module):
    def __init__(self, table: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.table, self.middle, self.head = table, nn.Linear(12, 12), head

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        return self.head(torch.tanh(self.middle(x)) + x)


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_embedding(settings: dict) -> None:
    model = check_family(Words(nn.Embedding(20, 12, **settings), nn.Linear(12, 3)), torch.randint(0, 20, (2, 5)))
    assert model.table.embedding_dim == model.head.in_features < 12


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str) -> None:
    words = torch.randint(0, 20, (4, 5))
    model = check_family(Words(nn.EmbeddingBag(20, 12, mode=mode), nn.Linear(12, 3)), words, prunes="table")
    assert model.table.embedding_dim == model.head.in_features < 12


def test_embedding_with_largest_norm_stays() -> None:
    stays(
        Words(nn.Embedding(20, 12, max_norm=1.0), nn.Linear(12, 3)), torch.randint(0, 20, (2, 5)), "table", "max_norm"
    )


def test_tied_embedding_and_head() -> None:
    model = Words(nn.Embedding(20, 12), nn.Linear(12, 20, bias=False))
    model.head.weight = model.table.weight
    check_family(model, torch.randint(0, 20, (2, 5)), prunes="table")
    assert model.head.weight is model.table.weight
    assert model.head.in_features == model.table.embedding_dim < 12
    assert model.head.out_features == model.table.num_embeddings == 20


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 7)
            self.meet, self.head = nn.Bilinear(8, 7, 9, bias=bias), nn.Linear(9, 3)

        def forward(self, x, y):
            return self.head(torch.relu(self.meet(torch.tanh(self.a(x)), self.b(y))))

    inputs = (torch.randn(2, 4, 5), torch.randn(2, 4, 5))
    assert fxslim.trace(Pair(), inputs).cost.layers["meet"] == 4 * 9 * 8 * 7
    model = check_family(Pair(), inputs, prunes="a b meet", seed=int(bias))
    assert (model.meet.in1_features, model.meet.in2_features) == (model.a.out_features, model.b.out_features)
    assert model.meet.out_features == model.head.in_features


def test_neighbours_are_normalised_together() -> None:
    stays(between(nn.LocalResponseNorm(5), nn.Conv2d(12, 8, 1), made=8), picture(), "0", "sum over its neighbours")


class Tokens(nn.Module):
    """A small vision transformer without attention: class token, position table, layer scale."""

    def __init__(self, scale: tuple[int, ...]) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 3)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(1, 5, 12))
        self.scale = nn.Parameter(torch.randn(scale))
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(x + self.scale * self.down(F.gelu(self.up(self.norm(x)))))


@pytest.mark.parametrize("scale", [(12,), (1, 1, 12), (5, 12), (1, 5, 1), (1,)])
def test_parameters_used_directly(scale: tuple[int, ...]) -> None:
    model = check_family(Tokens(scale), picture(), prunes="patches up")
    width = model.head.in_features
    assert model.places.shape == (1, 5, width)
    assert model.token.shape == (1, 1, width)
    assert model.scale.shape == tuple(width if size == 12 else size for size in scale)


class Latents(nn.Module):
    """Learned queries and registers: parameters that are tokens of their own."""

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.queries, self.registers = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(1, 4, 12))
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(12),
            nn.Linear(12, 20),
            nn.Linear(20, 12),
            nn.Linear(12, 3),
        )
        self.patches, self.shifts = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.randn(1, 3, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        a, b, c = self.shifts.chunk(3, dim=1)
        x = torch.cat([self.registers.expand(len(x), -1, -1), x * a], 1) * b + c
        latents = self.queries + self.down(F.gelu(self.up(self.norm(self.queries))))
        return self.head(torch.sigmoid(x.mean(1, keepdim=True)) * latents)


@pytest.mark.parametrize("shape", [(6, 12), (1, 6, 12)])
def test_parameters_that_are_tokens(shape: tuple[int, ...]) -> None:
    model = check_family(Latents(shape=shape), picture(), prunes="patches up down")
    width = model.head.in_features
    assert model.queries.shape == (*shape[:-1], width)
    assert model.registers.shape == (1, 4, width)
    assert model.shifts.shape == (1, 3, width)


def test_layer_scale_of_a_feature_map() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1)
            self.gamma, self.table = nn.Parameter(torch.randn(12, 1, 1)), nn.Parameter(torch.randn(12, 6, 6))

        def forward(self, x):
            return self.b(self.a(x) * self.gamma + torch.sigmoid(self.table))

    model = check_family(Scaled(), picture(), prunes="a")
    assert model.table.shape == (model.a.out_channels, 6, 6)


def test_a_weight_used_directly_too_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.c(self.b(torch.tanh(self.a(x))) + torch.tanh(self.a.weight))

    stays(Twice(), torch.randn(12, 12), "a", "used directly, and as a weight")


def test_large_parameters_are_not_labelled_entry_by_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxslim.graph.propagation.MOST_ENTRIES", 50)
    model = randomise(Tokens((12,)))
    assert "places is a parameter used directly" in fxslim.trace(model, picture()).report()


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_are_called_again(seed: int) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
            self.wide, self.end = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 4, 1)
            self.twin = nn.Conv2d(12, 24, 1)
            self.twin.weight = self.wide.weight

        def forward(self, x):
            x = self.stem(x)
            for _ in range(3):
                x = x + torch.relu(self.body(x))
            return self.end(torch.relu(self.wide(x)) - torch.relu(self.twin(-x)))

    model = check_family(Again(), picture(), prunes="stem body wide", seed=seed)
    assert model.twin.weight is model.wide.weight
    assert model.twin.out_channels == model.wide.out_channels < 24
