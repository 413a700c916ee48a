# SPDX-License-Identifier: Apache-2.0
"""Copies, averages and moves to other dtypes: quantizers stay what they are."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fxslim.nn import ActivationQuant, LinearQAT, QuantConfig, WeightQuant

METHODS = ["ulq", "lsq", "lsq+", "pact", "static", "min_max"]
methods = pytest.mark.parametrize("method", METHODS)


def network(method: str, batch_num: int = 1) -> nn.Sequential:
    config = QuantConfig(
        weight=WeightQuant(method="lsq"), activation=ActivationQuant(method=method, batch_num=batch_num)
    )
    return nn.Sequential(LinearQAT(6, 8, config=config), nn.ReLU(), LinearQAT(8, 3, config=config))


def train(model: nn.Module, batches: int, average: AveragedModel | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(batches):
        optimizer.zero_grad()
        model(torch.randn(16, 6)).pow(2).mean().backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)


@methods
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("decay", [None, 0.5, 0.9, 0.999, 0.9995])
@pytest.mark.parametrize("batch_num", [1, 3])
def test_averages_of_a_model(method: str, use_buffers: bool, decay: float | None, batch_num: int) -> None:
    """Averaging cuts whole numbers off; what was calibrated stays so, and what is on stays on."""
    model = network(method, batch_num)
    train(model, batch_num)
    average_fn = None if decay is None else get_ema_multi_avg_fn(decay)
    average = AveragedModel(model, multi_avg_fn=average_fn, use_buffers=use_buffers)
    train(model, 6, average)
    for layer in (average.module[0], average.module[2]):
        quantizer: Any = layer.input_quantizer
        assert quantizer.is_calibrated
        assert quantizer.enabled
        assert quantizer.observing
        assert layer.weight_quantizer.enabled
    x = torch.randn(64, 6)
    average.eval()
    model.eval()
    got = average(x)
    for layer in (average.module[0], average.module[2]):
        layer.input_quantizer.enabled = False
    assert not torch.equal(average(x), got)
    # The last steps were small: the average computes nearly what the model does.
    torch.testing.assert_close(got, model(x), rtol=0, atol=0.1)


@methods
def test_an_average_that_is_begun_before_calibration_ends(method: str) -> None:
    model = network(method, 2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    train(model, 30, average)
    assert average.module[0].input_quantizer.is_calibrated
    assert average.module[0].input_quantizer.batches_seen == model[0].input_quantizer.batches_seen


@methods
def test_deep_copies_are_apart(method: str) -> None:
    model = network(method, 2)
    train(model, 1)
    other = copy.deepcopy(model)
    before = copy.deepcopy(other.state_dict())
    train(model, 3)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert other[0].input_quantizer.is_calibrated == (method == "min_max")


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", [0, 1, 4])
def test_other_dtypes_at_any_time(method: str, dtype: torch.dtype, when: int) -> None:
    """Before, amid and after calibration; then training goes on."""
    model = network(method, 2)
    train(model, when)
    wide = copy.deepcopy(model).eval()
    model.to(dtype)
    x = torch.randn(16, 6)
    torch.testing.assert_close(model.eval()(x.to(dtype)).float(), wide(x).float(), rtol=0.1, atol=0.1)
    model.train()
    for _ in range(3):
        y = model(x.to(dtype))
        assert y.dtype == dtype
        y.float().mean().backward()
    assert model[0].input_quantizer.is_calibrated
    assert model[0].weight.grad.isfinite().all()
    assert model[0].input_quantizer.zero_point.dtype == torch.int32
    names = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    assert not names


@methods
def test_made_without_values_and_filled(method: str) -> None:
    """On the meta device, then from a state dict, as large models are loaded."""
    model = network(method)
    train(model, 3)
    with torch.device("meta"):
        empty = network(method)
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(4, 6)
    assert torch.equal(empty.eval()(x), model.eval()(x))
    with torch.device("meta"):
        empty = network(method)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(x), model(x))
    with torch.device("meta"):
        shapes = network(method)(torch.randn(4, 6))
    assert shapes.shape == (4, 3)


@methods
def test_on_the_device(method: str, device: torch.device) -> None:
    model = network(method).to(device)
    for _ in range(3):
        model(torch.randn(4, 6, device=device)).sum().backward()
    assert {value.device.type for value in model.state_dict().values()} == {device.type}
    assert model[0].input_quantizer.is_calibrated
