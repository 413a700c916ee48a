# SPDX-License-Identifier: Apache-2.0
"""Whole models of torchvision: planned, trained, saved, loaded, and proven to read no weight past its quantizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import fxslim
from benchmarks.models import quant_zoo
from benchmarks.models.zoo import randomise
from fxslim.nn import QuantizedLayer

# All layers, and quantizers of activations where the number is known by hand: of ResNet-18 the inputs of the first
# convolution, all outputs of layers (17 + 3 shortcuts + 1), 8 sums, and the pool.
MODELS = {
    "resnet18": (21, 31),
    "mobilenet_v2": (53, None),
    "mobilenet_v3_small": (54, None),
    "squeezenet1_1": (26, None),
    "shufflenet_v2_x0_5": (57, None),
    "densenet121": (121, None),
    "googlenet": (64, None),
}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
    "swin": lambda: SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], num_classes=5),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_torchvision(name: str, tmp_path: Path) -> None:
    model, x = quant_zoo.build(name)
    proof = quant_zoo.prove(model, x, tmp_path)
    layers, activations = MODELS[name]
    assert not proof.faults
    assert proof.layers == (layers, layers)
    assert proof.activations == activations or activations is None


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_of_torchvision(name: str, tmp_path: Path) -> None:
    model = randomise(TRANSFORMERS[name]()).eval()
    proof = quant_zoo.prove(model, torch.randn(2, 3, 32, 32), tmp_path)
    assert not proof.faults
    assert proof.layers[0] == proof.layers[1] >= 8


class KeepsItsWeight(nn.Module):
    """Reads the stored weight of its second layer, past everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.second._parameters["weight"].mean()


def test_the_proof_sees_a_weight_that_is_read_past_its_quantizer() -> None:
    """Without example inputs the plan can't know of it."""
    model, x = KeepsItsWeight(), torch.randn(4, 8)
    fxslim.prepare_qat(model).train()(x)
    assert isinstance(model.second, QuantizedLayer)
    faults = list(quant_zoo.poison_faults(model.eval(), x))
    assert len(faults) == 1
    assert "read past its quantizer" in faults[0]
