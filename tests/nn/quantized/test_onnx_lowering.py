# SPDX-License-Identifier: Apache-2.0
"""torch.onnx.export, as its users call it, writes quantized layers as QuantizeLinear and DequantizeLinear."""

import copy
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import CalibrationError, ExportError
from fxslim.nn import ActivationQuant, QuantConfig, WeightQuant
from fxslim.nn.quantized_layers import stored_weight
from fxslim.nn.quantizers.real_values import real_twin
from tests.export.onnx_runs import exported, operators, run

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 7, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), (1, 2, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 4)),
    "transposed in groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "linear": (nn.Linear(8, 5), (3, 8)),
    "linear on places": (nn.Linear(8, 5, bias=False), (2, 3, 8)),
}


def config(**weight: Any) -> QuantConfig:
    return QuantConfig(weight=WeightQuant(**weight))


def calibrated(model: nn.Module, *x: Tensor) -> nn.Module:
    model.train()
    for _ in range(3):
        model(*x)
    return model.eval()


def agree(model: nn.Module, *x: Tensor) -> onnx.ModelProto:
    wanted, written = model(*x), exported(model, *x)
    torch.testing.assert_close(run(written, *x)[0], wanted, rtol=1e-5, atol=1e-6)
    return written


@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x = torch.randn(shape)
    written = agree(calibrated(fxslim.prepare_qat(copy.deepcopy(layer), config()), x), x)
    assert operators(written)["QuantizeLinear"] == 1
    assert operators(written)["DequantizeLinear"] == 2
    integers = [one for one in written.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert max(np.prod(one.dims) for one in integers) == layer.weight.numel()
    assert all(np.prod(one.dims) < layer.weight.numel() for one in written.graph.initializer if one not in integers)


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "tensor"},
        {"bits": 4},
        {"bits": 4, "granularity": "group", "group_size": 4},
        {"method": "lsq", "bits": 3},
        {"method": "dorefa", "bits": 4, "granularity": "tensor"},
        {"method": "dorefa", "granularity": "tensor"},
        {"method": "binary", "bits": 1},
        {"bits": 12},
        {"format": "fp8_e4m3"},
        {"format": "fp4_e2m1"},
        {"reduce_range": True},
    ],
)
def test_each_grid_of_weights(settings: dict[str, Any]) -> None:
    for kind in ("linear", "transposed"):
        layer, shape = LAYERS[kind]
        x = torch.randn(shape)
        agree(calibrated(fxslim.prepare_qat(copy.deepcopy(layer), config(**settings)), x), x)


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": method} for method in ("ulq", "lsq", "lsq+", "min_max", "static")),
        {"method": "pact", "fixed_min": True},
        {"symmetric": True},
        {"signed": True},
        {"bits": 5},
        {"bits": 12},
        {"format": "fp8_e5m2", "method": "static"},
    ],
)
def test_each_grid_of_activations(settings: dict[str, Any]) -> None:
    model = nn.Sequential(
        nn.ReLU(), fxslim.nn.LinearQAT(8, 4, config=QuantConfig(activation=ActivationQuant(**settings)))
    )
    x = torch.randn(64, 8)
    x[0] *= 5
    calibrated(model, x)
    # In eval mode other values come than those that were seen.
    agree(model, x * 2)


def test_clips_that_were_trained_are_written_not_those_of_the_last_forward() -> None:
    layer: Any = calibrated(fxslim.nn.LinearQAT(8, 4, config="int8"), torch.randn(5, 8))
    with torch.no_grad():
        layer.input_quantizer.clip_max.mul_(0.5)
        layer.weight.mul_(3)
    x = torch.randn(5, 8) * 3
    written = exported(layer, x)
    torch.testing.assert_close(run(written, x)[0], layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention(need_weights: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            return self.attention(x, x, x, need_weights=need_weights)[0]

    tokens = torch.randint(0, 11, (2, 5))
    model = calibrated(fxslim.prepare_qat(Attending(), config()), tokens)
    assert operators(agree(model, tokens))["DequantizeLinear"] == 5


def test_masks_and_folded_norms() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    x = torch.randn(4, 4, 5, 5)
    fxslim.sparsify(model, "2:4", example_inputs=x)
    fxslim.prepare_qat(model, config(granularity="tensor"), example_inputs=x, fold_batch_norms=True)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-2, 2, 8))
    written = agree(calibrated(model, x), x)
    weights = {tuple(one.dims): onnx.numpy_helper.to_array(one) for one in written.graph.initializer}
    assert (weights[8, 4, 3, 3] == 0).mean() >= 0.5


def test_what_is_switched_off_stays_float() -> None:
    layer: Any = calibrated(fxslim.nn.LinearQAT(8, 4, config="int8"), torch.randn(5, 8))
    fxslim.quantization.switch_quantizers(layer, False)
    assert "QuantizeLinear" not in operators(agree(layer, torch.randn(5, 8)))


def test_no_range_yet() -> None:
    layer: Any = fxslim.nn.Conv2dQAT(3, 4, 3, config="int8").eval()
    message = r"can't be written as ONNX: the input of Conv2dQAT has no range yet: it has seen 0 of 1 training"
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError):
        exported(layer, torch.randn(1, 3, 5, 5))
    late = QuantConfig(start_step=5, activation=None)
    with pytest.raises(CalibrationError, match=r"the weight of LinearQAT is not quantized yet: it has seen 0 of"):
        stored_weight(fxslim.nn.LinearQAT(4, 4, config=late), "weight")


def test_formats_that_onnx_does_not_know() -> None:
    quant = ActivationQuant(format="fp6_e2m3", method="static")
    layer = calibrated(fxslim.nn.LinearQAT(8, 4, config=QuantConfig(activation=quant)), torch.randn(5, 8))
    message = "the input of LinearQAT is in fp6_e2m3, for which ONNX has no operator"
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError):
        exported(layer, torch.randn(5, 8))


def test_real_values_are_the_module_itself_outside_of_an_export() -> None:
    layer = nn.Linear(2, 2)
    assert real_twin(layer) is layer
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        stand_ins = nn.Linear(2, 2)
    with pytest.raises(ExportError, match=r"use fxslim\.export_onnx"):
        real_twin(stand_ins)


def test_export_leaves_the_model() -> None:
    model: Any = calibrated(nn.Sequential(fxslim.nn.LinearQAT(8, 4, config="int8")), torch.randn(5, 8))
    before, attributes = copy.deepcopy(model.state_dict()), {key: id(value) for key, value in vars(model[0]).items()}
    exported(model, torch.randn(5, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {key: id(value) for key, value in vars(model[0]).items()} == attributes


def test_rows_of_zeros_stay_integers() -> None:
    for settings in ({"method": "binary", "bits": 1}, {}):
        layer: Any = fxslim.nn.LinearQAT(8, 4, config=QuantConfig(weight=WeightQuant(**settings), activation=None))
        with torch.no_grad():
            layer.weight[1] = 0
        kept = stored_weight(layer, "weight")
        assert kept is not None
        assert kept.integers is not None
        torch.testing.assert_close(kept(), layer.computed().detach())
