# SPDX-License-Identifier: Apache-2.0
"""Cost against known figures, parents and children, reasons for what stays, families of networks."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxslim
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import randomise


def cifar_resnet(name: str) -> nn.Module:
    model = getattr(torchvision.models, name)(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


@pytest.mark.parametrize("name, macs", [("resnet50", 1_297_829_888), ("resnet18", 555_422_720)])
def test_macs_of_cifar_resnets(name: str, macs: int) -> None:
    assert fxslim.trace(cifar_resnet(name), torch.randn(1, 3, 32, 32)).cost.macs == macs


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "regnet_x_400mf", "squeezenet1_1", "convnext_tiny"])
def test_macs_agree_with_torch(name: str) -> None:
    model, x = getattr(torchvision.models, name)(), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    assert fxslim.trace(model, x).cost.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "model, x",
    [
        (torchvision.models.mobilenet_v3_small(), torch.randn(2, 3, 64, 64)),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), torch.randn(2, 5, 16)),
        (nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)),
        (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, 2, groups=4), nn.Conv2d(8, 2, 3)), torch.randn(3, 4, 6, 6)),
    ],
)
def test_quantized_layers_cost_what_they_did(model: nn.Module, x: torch.Tensor) -> None:
    before = fxslim.trace(model.eval(), x).cost.macs
    fxslim.quantize(model, "int8", data=[x], example_inputs=x)
    assert fxslim.trace(model, x).cost.macs == before > 0


def test_parents_children_and_reasons_of_resnet18() -> None:
    graph = fxslim.trace(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))
    assert graph.parents("layer2.0.conv1") == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
    assert graph.children("layer1.0.conv1") == ["layer1.0.conv2"]
    assert graph.explain("fc") == "fc: 1000 of 1000 channels stay: model output in fc"
    assert "layer1.0.conv1: 64 channels" in graph.explain("layer1.0.conv1")
    assert graph.frozen_layers() == {"fc": "model output in fc"}
    assert "12 groups, 2880 removable channels" in graph.report()
    assert "<table>" in graph._repr_html_()


FAMILIES = ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v2", "mnasnet0_5", "efficientnet_b0", "resnext50_32x4d",
            "regnet_y_400mf", "googlenet", "convnext_tiny", "shufflenet_v2_x0_5"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_torchvision_families(name: str) -> None:
    model, x = randomise(getattr(torchvision.models, name)()), torch.randn(1, 3, 64, 64)
    plan = fxslim.plan_pruning(model, x, ratio=0.5, importance="random")
    assert plan.macs[1] == pytest.approx(plan.macs[0] / 2, rel=0.01)
    proof = plan.verify(model, [x, torch.randn(1, 3, 96, 96)])
    assert proof.ok, str(proof)
    assert proof.relative <= TOLERANCE
    model = plan.apply(model).train()
    model(torch.randn(2, 3, 64, 64))


def test_frozen_parameters_are_pruned_like_any() -> None:
    model = torchvision.models.resnet18()
    for parameter in model.layer1.parameters():
        parameter.requires_grad_(False)
    assert len(fxslim.trace(model, torch.randn(1, 3, 64, 64)).groups) == 12


def test_a_path_not_taken_is_frozen_and_said() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.used(x) if x.shape[0] < 100 else self.unused(x))

    graph = fxslim.trace(Twice(), torch.randn(3, 4))
    assert graph.not_reached == ["unused.weight"]
    assert "not reached by the example inputs" in graph.explain("unused")


def test_squeezing_to_a_literal_number_of_chunks_freezes_with_a_reason() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            first, _ = torch.split(self.a(x), [3, 5], 1)
            return self.b(first)

    graph = fxslim.trace(Split(), torch.randn(1, 3, 4, 4))
    text = graph.explain("a")
    assert "a: 3 of 8 channels stay: a part of 3 channels split at test_channel_graph.py:" in text
    assert "a: 5 of 8 channels stay: a part of 5 channels" in text
