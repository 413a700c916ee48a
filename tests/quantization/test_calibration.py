# SPDX-License-Identifier: Apache-2.0
"""Ranges from data without training: what is seen, what is refused, and how near the result is."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim import CalibrationError, ConfigError, UnsupportedLayerError
from fxslim.nn import ActivationQuant, QuantConfig, WeightQuant
from fxslim.nn.quant_config import CALIBRATIONS
from fxslim.nn.quantizers import each_activation_quantizer
from tests.quantization.small_networks import convolutions

DATA = [torch.randn(4, 3, 16, 16) for _ in range(3)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return convolutions().eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_each_calibration_comes_near_float(model: nn.Module, calibration: str) -> None:
    expected = model(DATA[0])
    fxslim.quantize(model, "int8", data=DATA, calibration=calibration)
    error = (model(DATA[0]) - expected).norm() / expected.norm()
    assert 0 < error < 0.1
    for quantizer in each_activation_quantizer(model).values():
        assert quantizer.is_calibrated
        assert quantizer.config.calibration == calibration


def test_the_model_is_float_while_it_is_calibrated(model: nn.Module) -> None:
    expected = model(DATA[0])
    fxslim.prepare_qat(model, "w4a4", example_inputs=DATA[0])
    with fxslim.calibrating(model):
        assert torch.equal(model(DATA[0]), expected)
        model(DATA[1])
    assert not torch.allclose(model(DATA[0]), expected)


def test_own_forwards_and_batches_choose_the_same(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    static = QuantConfig(activation=ActivationQuant(method="static", calibration="mse"))
    fxslim.prepare_qat(twin, static, example_inputs=DATA[0])
    with fxslim.calibrating(twin), torch.no_grad():
        for batch in DATA:
            twin(batch)
    fxslim.quantize(model, data=DATA)
    assert torch.equal(model(DATA[0]), twin(DATA[0]))


def test_batches_of_any_form(model: nn.Module) -> None:
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    fxslim.quantize(model, data=DATA)
    fxslim.quantize(twin, data=iter([(batch, torch.zeros(4)) for batch in DATA]))
    fxslim.quantize(
        other, data=[{"picture": batch} for batch in DATA], forward=lambda m, b: m(b["picture"]), example_inputs=DATA[0]
    )
    assert torch.equal(model(DATA[0]), twin(DATA[0]))
    assert torch.equal(model(DATA[0]), other(DATA[0]))


def test_modes_stay_and_training_may_go_on(model: nn.Module) -> None:
    model.train()
    fxslim.quantize(model, data=DATA)
    assert all(module.training for module in model.modules())
    model(DATA[0]).sum().backward()
    assert model[0].weight.grad is not None


def test_too_little_data(model: nn.Module) -> None:
    config = QuantConfig(activation=ActivationQuant(batch_num=5))
    before = state(model)
    with pytest.raises(CalibrationError, match="the input of 0 saw 3 batches, and its config's batch_num is 5"):
        fxslim.quantize(model, config, data=DATA)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ConfigError, match="data has no batches"):
        fxslim.quantize(model, data=[], example_inputs=DATA[0])


def test_data_that_never_reaches_a_layer() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            return self.one(x) if x.sum() > 0 else self.other(x)

    model = fxslim.quantize(Branch(), data=[torch.ones(2, 4)])
    assert type(model.other) is nn.Linear
    note = "other stays in float: the example inputs do not reach it, and give it no range"
    assert note in fxslim.applied(model)[0].notes
    for wishes in ({"layers": ["other", "one"]}, {"layers": ["other"]}):
        with pytest.raises(UnsupportedLayerError, match="other can't be quantized: the example inputs do not reach it"):
            fxslim.quantize(Branch(), data=[torch.ones(2, 4)], **wishes)
    model = fxslim.prepare_qat(Branch())
    with (
        pytest.raises(CalibrationError, match="saw no data: the input of other"),
        fxslim.calibrating(model),
        torch.no_grad(),
    ):
        model(torch.ones(2, 4))


def test_data_that_is_not_finite(model: nn.Module) -> None:
    bad = DATA[1].clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"batch 1 of data: the input of 0: 1 of 3072 observed entries are NaN"):
        fxslim.quantize(model, data=[DATA[0], bad])


def test_an_error_inside_leaves_ranges_as_they_were(model: nn.Module) -> None:
    fxslim.quantize(model, data=DATA)
    before = state(model)
    with contextlib.suppress(KeyError), fxslim.calibrating(model):
        model(DATA[0] * 100)
        raise KeyError
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before if "calibration_" not in name)
    with (
        pytest.raises(ConfigError, match="no activation of this model is quantized"),
        fxslim.calibrating(nn.Linear(2, 2)),
    ):
        pass
    with pytest.raises(ConfigError, match="calibration must be one of"):
        fxslim.quantize(convolutions(), data=DATA, calibration="kl")


def test_four_bits_of_weights_alone(model: nn.Module) -> None:
    expected = model(DATA[0])
    config = QuantConfig(weight=WeightQuant(bits=4, granularity="channel"), activation=None)
    fxslim.quantize(model, config, data=DATA)
    assert not each_activation_quantizer(model)
    error = (model(DATA[0]) - expected).norm() / expected.norm()
    assert 0 < error < 0.4


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoders_before_and_behind_norms(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model, x = nn.Sequential(encoder, nn.Linear(16, 4)).eval(), torch.randn(5, 2, 16)
    wanted = model(x)
    fxslim.quantize(model, "int8", data=[x], example_inputs=x)
    assert (model(x) - wanted).norm() < 0.1 * wanted.norm()
    # An output is quantized once.
    assert all(layer.self_attn.output_quantizer is None for layer in encoder.layers)
