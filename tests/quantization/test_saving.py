# SPDX-License-Identifier: Apache-2.0
"""Quantized models stopped and resumed, planned anew from a file, and exchanged with float models."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fxslim
from fxslim.nn import ActivationQuant, QuantConfig
from fxslim.nn.quantizers import each_activation_quantizer
from tests.quantization.small_networks import NETWORKS, batch, batches, step

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.002, weight_decay=0.1),
}
networks = pytest.mark.parametrize("network", NETWORKS)
# Weights learn their scale too; ranges are still being chosen at the stop, or nothing is quantized yet.
CONFIGS = {
    "ulq": QuantConfig(),
    "min_max": QuantConfig(activation=ActivationQuant(method="min_max")),
    "learned weights": QuantConfig.from_dict({"weight": {"method": "lsq"}, "activation": {"method": "lsq"}}),
    "in calibration": QuantConfig(activation=ActivationQuant(batch_num=12)),
    "before its start": QuantConfig(start_step=12),
}


def started(network: str, config: QuantConfig, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A quantized model and its optimizer, as a script builds them at its start."""
    model = NETWORKS[network]()
    optimizer = OPTIMIZERS[kind](model.parameters())
    fxslim.prepare_qat(model, config, example_inputs=torch.zeros(2, 3, 16, 16), optimizer=optimizer)
    return model.train(), optimizer


def assert_same(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("way", ["fxslim.save", "state_dict"])
@pytest.mark.parametrize(
    ("network", "config", "kind"),
    [*(("convolutions", name, "adamw") for name in CONFIGS), ("vit", "ulq", "sgd"), ("swin", "ulq", "sgd")],
)
def test_stopped_and_resumed_is_uninterrupted(network: str, config: str, kind: str, way: str, tmp_path: Path) -> None:
    data = batches(16)
    model, optimizer = started(network, CONFIGS[config], kind)
    for x, y in data[:10]:
        step(model, optimizer, x, y)
    if way == "fxslim.save":
        fxslim.save(model, tmp_path / "stopped", optimizer=optimizer)
    else:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "stopped")
    for x, y in data[10:]:
        step(model, optimizer, x, y)
    if way == "fxslim.save":
        resumed = NETWORKS[network]()
        update = OPTIMIZERS[kind](resumed.parameters())
        fxslim.load(resumed, tmp_path / "stopped", optimizer=update)
    else:
        resumed, update = started(network, CONFIGS[config], kind)
        kept = torch.load(tmp_path / "stopped", weights_only=True)
        resumed.load_state_dict(kept["model"])
        update.load_state_dict(kept["optimizer"])
    assert len(update.param_groups) == len(optimizer.param_groups)
    for x, y in data[10:]:
        step(resumed.train(), update, x, y)
    assert_same(model, resumed)
    x, _ = batch()
    assert torch.equal(model.eval()(x), resumed.eval()(x))


@networks
def test_weights_of_the_float_model_fit(network: str) -> None:
    """Both ways: names of weights are those of the float model."""
    plain, (x, _) = NETWORKS[network](), batch()
    model = fxslim.prepare_qat(NETWORKS[network](), example_inputs=x).train()
    model.load_state_dict(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    model(x)
    assert all(quantizer.is_calibrated for quantizer in each_activation_quantizer(model).values())
    back = NETWORKS[network]()
    found = back.load_state_dict(model.state_dict(), strict=False)
    assert not found.missing_keys
    assert all("_quantizer." in name for name in found.unexpected_keys)
    for name, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@networks
def test_a_plan_from_a_file_is_the_plan(network: str, tmp_path: Path) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    fresh = copy.deepcopy(model)
    plan = fxslim.plan_quantization(model, "w4a8", example_inputs=x)
    plan.save(tmp_path / "plan.json")
    again = fxslim.load_plan(tmp_path / "plan.json")
    assert str(again) == str(plan)
    assert again.to_dict() == plan.to_dict()
    nets = [plan.apply(model), again.apply(fresh)]
    for net in nets:
        update = torch.optim.SGD(net.parameters(), lr=0.02)
        for _ in range(3):
            step(net.train(), update, x, y)
    assert_same(*nets)
    assert str(nets[0]) == str(nets[1])


@networks
def test_a_copy_is_a_model_of_its_own(network: str) -> None:
    model, (x, y) = NETWORKS[network](), batch()
    fxslim.prepare_qat(model, example_inputs=x).train()(x)
    other = copy.deepcopy(model)
    expected = copy.deepcopy(model).eval()(x)
    update = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, update, x, y)
    assert torch.equal(other.eval()(x), expected)
    assert not torch.equal(model.eval()(x), expected)
