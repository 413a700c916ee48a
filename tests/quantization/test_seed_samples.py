# SPDX-License-Identifier: Apache-2.0
"""The training parts of two samples that users of single quantized layers know; only import lines differ."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import resnet101

from fxslim.nn import Conv2dQAT, LinearQAT
from fxslim.nn.quantizers import each_activation_quantizer

BATCH_NUM = 10


def config(channel_wise: bool) -> dict:
    return {
        "retrain_data_config": {
            "dst_type": "INT8",
            "batch_num": BATCH_NUM,
            "fixed_min": False,
            "clip_min": None,
            "clip_max": None,
        },
        "retrain_weight_config": {
            "dst_type": "INT8",
            "weights_retrain_algo": "arq_retrain",
            "channel_wise": channel_wise,
        },
    }


def digits(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of 28 pixels of ten kinds: a bright square at a place of its own, and noise."""
    labels = torch.arange(number) % 10
    pictures = 0.3 * torch.randn(number, 1, 28, 28)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        top, left = 2 + 5 * (label // 2), 4 + 12 * (label % 2)
        picture[0, top : top + 4, left : left + 6] += 2.0
    return pictures, labels


def train(net: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, epochs: int, **settings: float) -> list[float]:
    """The mean loss of each epoch."""
    optimizer, means = torch.optim.Adam(net.parameters(), **settings), []
    net.train()
    for _ in range(epochs):
        losses = []
        for x, y in zip(pictures.split(20), labels.split(20), strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    return means


def on_a_grid(values: torch.Tensor, scale: torch.Tensor) -> bool:
    steps = values / scale
    return bool((steps - steps.round()).abs().max() < 1e-3)


def test_training_from_scratch() -> None:
    settings = config(channel_wise=False)
    net = torch.nn.Sequential(
        Conv2dQAT(1, 6, kernel_size=5, padding=2, config=settings), nn.Sigmoid(),
        nn.AvgPool2d(kernel_size=2, stride=2),
        Conv2dQAT(6, 16, kernel_size=5, config=settings), nn.Sigmoid(),
        nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Flatten(),
        LinearQAT(16 * 5 * 5, 120, config=settings), nn.Sigmoid(),
        LinearQAT(120, 84, config=settings), nn.Sigmoid(),
        LinearQAT(84, 10, config=settings)
    )  # fmt: skip
    pictures, labels = digits(400)
    losses = train(net, pictures, labels, epochs=12, lr=0.01)
    assert losses[0] > 2
    assert losses[-1] < 0.3
    assert all(quantizer.batches_seen == BATCH_NUM for quantizer in each_activation_quantizer(net).values())
    with torch.no_grad():
        net.eval()
        held_out, kinds = digits(200)
        assert (net(held_out).argmax(1) == kinds).float().mean() > 0.95
        for layer in (net[0], net[3], net[7], net[9], net[11]):
            assert layer.scale.shape == (1,)
            assert on_a_grid(layer.computed(), layer.scale)


def _set_module(model, submodule_key, module):
    tokens = submodule_key.split(".")
    sub_tokens = tokens[:-1]
    cur_mod = model
    for s in sub_tokens:
        cur_mod = getattr(cur_mod, s)
    setattr(cur_mod, tokens[-1], module)


@pytest.fixture(scope="module")
def fine_tuned() -> tuple[nn.Module, dict[str, torch.Tensor], list[float]]:
    """The model, its weights before, and losses: quantized by the user's own loop, then trained."""
    torch.manual_seed(0)
    model = resnet101()
    before = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            qat_module = Conv2dQAT.from_float(module, config=config(channel_wise=True))
            _set_module(model, name, qat_module)
    torch.manual_seed(1)
    pictures, optimizer, losses = torch.randn(4, 3, 64, 64), torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(BATCH_NUM + 4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, before, losses


def test_fine_tuning_by_the_users_own_loop(fine_tuned) -> None:
    model, before, losses = fine_tuned
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 104
    assert all(type(layer) is Conv2dQAT for layer in layers)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in before.items())
    assert losses[-1] < losses[0] / 2
    assert all(torch.isfinite(torch.tensor(losses)))


def test_fine_tuning_quantizes_after_the_calibration_batches(fine_tuned) -> None:
    model, _, _ = fine_tuned
    for layer in (module for module in model.modules() if isinstance(module, Conv2dQAT)):
        assert layer.scale.shape == (layer.out_channels,)
        assert on_a_grid(layer.computed().detach(), layer.scale[:, None, None, None])
        quantizer = layer.input_quantizer
        assert quantizer.batches_seen == BATCH_NUM
        assert quantizer.clip_min.grad is not None
        assert quantizer.clip_max.grad is not None
        low, high = quantizer.clips()
        assert low <= 0 < high
