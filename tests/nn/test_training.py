# SPDX-License-Identifier: Apache-2.0
"""Masks through training: no optimizer revives a masked weight; the kept ones learn as if the others were not there."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxslim
from fxslim.nn import MaskedConv2d, MaskedLinear
from fxslim.patterns import NM, Block, Unstructured, check
from tests.nn.masked_layers import plain_twin

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.02),
    "sgd_decay": functools.partial(torch.optim.SGD, lr=0.02, weight_decay=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.02),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.2),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.005, momentum=0.5, centered=True),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Network(nn.Module):
    """A convolution and a linear layer of this pattern."""

    def __init__(self, pattern, **settings) -> None:
        super().__init__()
        self.first = MaskedConv2d(4, 8, 3, pattern=pattern, **settings)
        self.second = MaskedLinear(32, 4, pattern=pattern, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu().flatten(1))


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(5, 4, 4, 4), torch.randn(5, 4)) for _ in range(number)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()


@optimizers
@pytest.mark.parametrize("pattern", [NM(2, 4), Block(cin=2, cout=2, ratio=0.5), Unstructured(0.7)], ids=str)
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
def test_masks_hold_through_100_steps(optimizer: str, pattern, gradient: str) -> None:
    model = Network(pattern, gradient=gradient)
    layers = (model.first, model.second)
    before = [(layer.weight_mask, layer.weight_mask.clone(), layer.weight.detach().clone()) for layer in layers]
    update = OPTIMIZERS[optimizer](model.parameters())
    for x, y in batches(100):
        train(model, update, x, y)
        for layer, (mask, copy, _) in zip(layers, before, strict=True):
            assert layer.weight_mask is mask
            assert torch.equal(mask, copy)
            assert not layer.masked()[~mask].any()
            assert layer.masked()[mask].all()
    for layer, (mask, _, start) in zip(layers, before, strict=True):
        assert check(layer, pattern).ok
        assert torch.isclose(layer.weight, start)[mask].float().mean() < 0.1


@optimizers
def test_what_is_kept_learns_as_in_a_plain_network_held_at_zero(optimizer: str) -> None:
    """Against a plain network whose masked weights are written back to 0 after every step."""
    model = Network("2:4").double()
    plain = nn.Sequential(plain_twin(model.first), nn.ReLU(), nn.Flatten(), plain_twin(model.second))
    pairs = [(model.first, plain[0]), (model.second, plain[3])]
    updates = [OPTIMIZERS[optimizer](net.parameters()) for net in (model, plain)]
    for x, y in batches(30):
        for net, update in zip((model, plain), updates, strict=True):
            update.zero_grad()
            F.mse_loss(net(x.double()), y.double()).backward()
            for layer in (plain[0], plain[3]) if net is plain else ():
                layer.weight.grad.mul_(layer.weight_mask)
            update.step()
        with torch.no_grad():
            for _, layer in pairs:
                layer.weight.mul_(layer.weight_mask)
    for masked, layer in pairs:
        torch.testing.assert_close(masked.masked(), layer.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update_freq", [0, 1, 7])
@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
@pytest.mark.parametrize("regrow", [0.0, 1.0])
def test_the_pattern_is_exact_while_masks_change(update_freq: int, gradient: str, regrow: float) -> None:
    pattern = NM(2, 4)
    model = Network(pattern, update_freq=update_freq, gradient=gradient, regrow=regrow)
    update, changes = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0
    for x, y in batches(40):
        before = model.first.weight_mask
        train(model, update, x, y)
        changes += not torch.equal(before, model.first.weight_mask)
        for layer in (model.first, model.second):
            assert layer.weight_mask.sum() * 2 == layer.weight.numel()
            assert check(layer, pattern).ok
    assert changes > 0 or (not update_freq) or (gradient == "zero" and not regrow)


def test_sr_ste_step_by_step() -> None:
    """Mask from the magnitudes; the whole gradient of the masked weight, and decay times what is masked."""
    layer = MaskedLinear(
        8, 3, bias=False, pattern="2:4", update_freq=1, gradient="sr_ste", decay=0.3, dtype=torch.float64
    )
    weight, update = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), lr=0.05)
    masks = set()
    for _ in range(30):
        x, y = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        update.zero_grad()
        (layer(x) - y).pow(2).sum().backward()
        update.step()
        mask = torch.zeros(3, 8, dtype=torch.float64)
        for o in range(3):
            for group in (0, 4):
                for i in sorted(range(group, group + 4), key=lambda i: -abs(weight[o, i].item()))[:2]:
                    mask[o, i] = 1
        gradient = 2 * (x @ (weight * mask).T - y).T @ x
        weight -= 0.05 * (gradient + 0.3 * (1 - mask) * weight)
        torch.testing.assert_close(layer.weight.detach(), weight)
        assert torch.equal(layer.weight_mask, mask.bool())
        masks.add(tuple(mask.flatten().tolist()))
    assert len(masks) > 1


@optimizers
def test_momentum_from_before_does_not_revive(optimizer: str) -> None:
    """Dense training first: apply(optimizer=) clears what the optimizer keeps for masked weights."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    update = OPTIMIZERS[optimizer](model.parameters())
    for x, y in batches(5):
        train(model, update, x, y)
    fxslim.sparsify(model, "2:4", optimizer=update)
    for layer in (model[0], model[3]):
        for value in update.state[layer.weight].values():
            if isinstance(value, torch.Tensor) and value.shape == layer.weight.shape:
                assert not value[~layer.weight_mask].any()
    for x, y in batches(5):
        train(model, update, x, y)
        assert check(model[0], "2:4").ok
        assert check(model[3], "2:4").ok


def test_frozen_weights_stay_masked_and_still() -> None:
    for gradient in ("zero", "sr_ste"):
        model = Network("2:4", gradient=gradient, update_freq=1, regrow=0.5)
        model.first.weight.requires_grad_(False)
        before = model.first.weight.clone()
        for x, y in batches(3):
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y)
        assert torch.equal(model.first.weight, before)
        assert check(model.first, "2:4").ok
