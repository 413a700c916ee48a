# SPDX-License-Identifier: Apache-2.0
"""Two samples that users of single quantized layers know, from training to files; only import lines differ."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torchvision.models.resnet import resnet101

from fxslim.export import convert_qat_model
from fxslim.nn import Conv2dQAT, LinearQAT
from fxslim.nn.quantizers import each_activation_quantizer
from tests.export.onnx_runs import operators, run

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


@pytest.fixture(scope="module")
def from_scratch() -> tuple[nn.Module, list[float]]:
    """The network and its losses."""
    torch.manual_seed(0)
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
    return net, train(net, pictures, labels, epochs=12, lr=0.01)


def test_training_from_scratch(from_scratch) -> None:
    net, losses = from_scratch
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


def same_kinds(file: Path, model: nn.Module, pictures: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = model.eval()(pictures).argmax(1)
    return (run(str(file), pictures)[0].argmax(1) == wanted).float().mean().item()


def test_files_of_the_first_sample(from_scratch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, (data, _) = from_scratch[0].eval(), digits(200)
    torch.onnx.export(model, data, "inter_model.onnx")
    counts = operators("inter_model.onnx")
    assert counts["QuantizeLinear"] == 5
    assert counts["Conv"] == 2
    convert_qat_model("inter_model.onnx", "./outputs/lenet")
    fake_quant, deploy = (tmp_path / "outputs" / f"lenet_{kind}_model.onnx" for kind in ("fake_quant", "deploy"))
    assert same_kinds(fake_quant, model, data) == 1
    counts = operators(str(deploy))
    assert (counts["AscendQuant"], counts["AscendDequant"]) == (5, 5)
    weights = [one for one in onnx.load(deploy).graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert sum(len(one.raw_data) for one in weights) == 150 + 2400 + 48000 + 10080 + 840


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


def test_files_of_the_second_sample(fine_tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = fine_tuned[0].eval(), torch.randn(4, 3, 64, 64)
    torch.onnx.export(model, data, "inter_model.onnx")
    convert_qat_model("inter_model.onnx", "./outputs/resnet101")
    # Two layers that read one tensor, and learned one scale, share a pair.
    assert 100 <= operators("inter_model.onnx")["QuantizeLinear"] <= 104
    assert operators("outputs/resnet101_deploy_model.onnx")["AscendDequant"] == 104
    wanted = model(data)
    for file in ("inter_model.onnx", "outputs/resnet101_fake_quant_model.onnx"):
        got = run(file, data)[0]
        assert (got - wanted).norm() < 0.1 * wanted.norm()
