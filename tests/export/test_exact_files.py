# SPDX-License-Identifier: Apache-2.0
"""Files of convolutional networks give the model's numbers: of very many values none is on another step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.export import export_onnx

# The last layer's output is on a grid, too: a value on another step is some 1e-4.
LAST_PLACES = 1e-6


def _stage(width: int, groups: int, activation: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(width), activation]


class Residual(nn.Module):
    """A sum with what came in, one layer's channels beside another's, and a gate for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_stage(width, 1, nn.ReLU()), *_stage(width, 4, nn.ReLU6()))
        self.halves = nn.ModuleList(nn.Sequential(*_stage(width, 1, nn.ReLU())[:2]) for _ in range(2))
        self.squeezed = nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1), nn.Sigmoid())
        self.last = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.inner(x) + x).relu()
        x = x * self.squeezed(nn.functional.adaptive_avg_pool2d(x, 1))
        return self.last(torch.cat([half(x) for half in self.halves], 1).relu()) + x


def network(name: str) -> nn.Module:
    stem = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    head = [nn.MaxPool2d(2), nn.Conv2d(24, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)]
    pointwise = [nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24)]
    middle = {
        "plain": [*_stage(24, 1, nn.ReLU()), *_stage(24, 1, nn.ReLU())],
        "depthwise": [*_stage(24, 24, nn.ReLU6()), *pointwise, *_stage(24, 24, nn.ReLU6())],
        "residual": [Residual(24), Residual(24), Residual(24)],
        "groups": [*_stage(24, 4, nn.ReLU()), nn.ChannelShuffle(4), *_stage(24, 3, nn.Hardtanh(-3.0, 4.0))],
    }[name]
    return nn.Sequential(*stem, *middle, *head)


def randomised(model: nn.Module, x: Tensor) -> nn.Module:
    """Weights of order 1, norms that have seen the data: a value on another step changes others further on."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5 * 1.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


def check(model: nn.Module, x: Tensor, folder: Path) -> None:
    found = export_onnx(model, x, folder / "m.onnx")
    assert found is not None
    assert found.relative < LAST_PLACES


@pytest.mark.parametrize("config", ["int8", "w4a8"])
@pytest.mark.parametrize("name", ["plain", "depthwise", "groups", "residual"])
def test_no_value_differs(name: str, config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    model = fxslim.quantize(randomised(network(name), x), config, data=[x], example_inputs=x)
    check(model, x, tmp_path)


def test_a_deep_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)
    stages = [stage for _ in range(12) for stage in _stage(48, 1, nn.ReLU())]
    deep = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), *stages, nn.Conv2d(48, 4, 1))
    model = fxslim.quantize(randomised(deep, x), data=[x], example_inputs=x)
    check(model, x, tmp_path)


def test_trained_on_its_grids(tmp_path: Path) -> None:
    """Learned clips and moving norms: the grids in eval mode are the file's, whatever they came to."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    model = fxslim.prepare_qat(randomised(network("depthwise"), x), "int8", example_inputs=x).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    check(model.eval(), x, tmp_path)
