# SPDX-License-Identifier: Apache-2.0
"""Norms that users write by hand: means over channels in a module that has a vector for them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxslim
from fxslim.pruning.verification import TOLERANCE
from tests.graph.proofs import check_family, picture, stays
from tests.graph.random_networks import randomise


class Rms(nn.Module):
    """As language models have it: in float32 whatever the input is, the weight last."""

    def __init__(self, channels: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.ones(channels)), 1e-6, offset

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.offset + self.weight) * y.to(x.dtype)


class LayerNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Spread(LayerNorm2d):
    """Mean and variance at once, or the variance alone, over channels and pixels or channels only."""

    def __init__(self, channels: int, way: str) -> None:
        super().__init__(channels)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "both":
            variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt()
        elif self.way == "pixels too":
            x = (x - x.mean(dim=(1, 2, 3), keepdim=True)) / (x.var(dim=(1, 2, 3), keepdim=True) + 1e-5).sqrt()
        elif self.way == "std":
            x = x / (x.std(1, keepdim=True) + 1e-3)
        else:
            x = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-3)
        return self.weight.view(1, -1, 1, 1) * x + self.bias.view(1, -1, 1, 1)


class ResponseNorm(nn.Module):
    """Each channel's size over all pixels, beside the mean over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * size / (size.mean(dim=1, keepdim=True) + 1e-6)) + self.beta + x


class Residual(nn.Module):
    """A stream of tokens with norms before and after each step, one of them shared."""

    def __init__(self, norm=Rms, channels: int = 12) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Linear(5, channels), norm(channels), norm(channels)
        self.up, self.down, self.head = nn.Linear(channels, 16), nn.Linear(16, channels), nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.embed(x))
        x = x + self.down(F.gelu(self.up(self.first(x))))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.second(x))


PICTURES = {
    "layer norm": LayerNorm2d,
    "response norm": ResponseNorm,
    **{way: lambda channels, way=way: Spread(channels, way) for way in ("both", "pixels too", "std", "norm")},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norms_in_a_residual_stream(seed: int, offset: float) -> None:
    torch.manual_seed(seed)
    model = Residual(lambda channels: Rms(channels, offset), channels=[12, 8, 17][seed])
    # As many tokens as channels: the dim is known by what is averaged over.
    x = [torch.randn(2, 12, 5), torch.randn(2, 1, 5), torch.randn(12, 5)]
    check_family(model, x, prunes="embed up", seed=seed)
    assert model.first.weight.shape == model.second.weight.shape == (model.head.in_features,)


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("size", [8, 14])
def test_norms_of_pictures(kind: str, size: int) -> None:
    norm = PICTURES[kind](12)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Sigmoid(), norm, nn.Tanh(), nn.Conv2d(12, 4, 1))
    if (kind, size) == ("pixels too", 14):
        # 12 channels and 12 pixels: the vectors could be for either.
        stays(model, picture(size=size), "0", "mean over channels")
    else:
        check_family(model, picture(size=size), prunes="0", ratio=0.3)


def test_norms_of_heads() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head_dim = 6
            self.q, self.k, self.v, self.out = (nn.Linear(5, 24) for _ in range(4))
            self.out, self.norm_q, self.norm_k = nn.Linear(24, 5), Rms(6), Rms(24)

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:-1], -1, self.head_dim)
            q, k = self.norm_q(self.q(x).view(shape)), self.norm_k(self.k(x)).view(shape)
            q, k, v = (y.transpose(1, 2) for y in (q, k, self.v(x).view(shape)))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = check_family(Attention(), torch.randn(2, 7, 5), prunes="q", ratio=0.5)
    assert model.norm_q.weight.shape == (6,)
    assert model.norm_k.weight.shape == (model.q.out_features,)


class Around(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Linear(5, 12), middle, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.middle(torch.sigmoid(self.a(x)))))


def test_a_mean_without_a_vector_stays() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(-1, keepdim=True)

    class WithLayer(Rms):
        def __init__(self) -> None:
            super().__init__(12)
            self.layer = nn.Linear(12, 12)

    class Summed(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.sum(-1, keepdim=True) / x.shape[-1])

    stays(Around(Centred()), torch.randn(2, 7, 5), "a", "mean over channels")
    stays(Around(WithLayer()), torch.randn(2, 7, 5), "a", "mean over channels")
    stays(Around(Summed(12)), torch.randn(2, 7, 5), "a", "sum over channels")


def test_a_norm_of_everything_without_a_dim_stays() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.norm() + x.mean())

    stays(Around(Scaled()), torch.randn(2, 7, 5), "a", "over channels")


def test_a_masked_model_trains_like_the_pruned_one() -> None:
    x, y = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)

    class Double(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    torch.manual_seed(0)
    model = randomise(Residual(Double)).double()
    plan = fxslim.plan_pruning(model, x, ratio=0.4, importance="random")
    assert any(cut.name == "first.weight" for cut in plan.cuts)
    pruned = plan.apply(randomise(Residual(Double)).double().requires_grad_())
    pruned.load_state_dict(plan.apply(_copy(model)).state_dict())
    plan.mask(model)
    for net in (model, pruned):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(net(x), y).backward()
            optimizer.step()
    assert (model(x) - pruned(x)).abs().max() / pruned(x).abs().max() < TOLERANCE


def _copy(model: nn.Module) -> nn.Module:
    result = Residual(type(model.first)).double()
    result.load_state_dict(model.state_dict())
    return result
