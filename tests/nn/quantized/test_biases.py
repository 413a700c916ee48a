# SPDX-License-Identifier: Apache-2.0
"""Biases in eval mode are whole steps of the sums, as integer kernels add them; in training they are as they are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.nn import ActivationQuant, QuantConfig, QuantizedLayer, WeightQuant
from fxslim.nn.bias_grids import input_scale

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 8), (5, 6)),
    "conv1d": (nn.Conv1d(4, 8, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2), (2, 2, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 8, 3, groups=2), (2, 4, 7, 7)),
}


def prepared(kind: str, config: Any = "int8", dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    x = torch.randn(shape, dtype=dtype)
    model = nn.Sequential(copy.deepcopy(layer).to(dtype))
    return fxslim.quantize(model, config, data=[x], example_inputs=x)[0].eval(), x


def whole(values: Tensor, step: Tensor) -> bool:
    steps = (values / step).double()
    return bool(((steps - steps.round()).abs() <= 1e-5 * steps.abs().clamp(min=1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("kind", LAYERS)
def test_they_are_whole_steps(kind: str, granularity: str, dtype: torch.dtype) -> None:
    layer, x = prepared(kind, QuantConfig(weight=WeightQuant(granularity=granularity)), dtype)
    _, bias = layer.terms()
    given = input_scale(layer)
    assert given is not None
    step = given * layer.scale
    assert whole(bias, step)
    assert not whole(layer.bias, step)
    assert bool(((bias - layer.bias).abs() <= step * 0.5001).all())
    channels = [1, -1, *[1] * (x.dim() - 2)]
    layer.output_quantizer = None
    with torch.no_grad():
        given_out = layer(x)
        layer.bias.zero_()
        torch.testing.assert_close(given_out, layer(x) + bias.reshape(channels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_adds_the_bias_itself(kind: str) -> None:
    layer, _ = prepared(kind)
    assert layer.train().terms()[1] is layer.bias


def test_gradients_in_eval_mode_reach_the_bias() -> None:
    layer, x = prepared("conv2d")
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((8,), 2.0 * 7 * 7))


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(weight=WeightQuant(bits=16)),
        QuantConfig(weight=WeightQuant(format="fp8_e4m3")),
        QuantConfig(weight=WeightQuant(granularity="group", group_size=3)),
        QuantConfig(activation=ActivationQuant(bits=16)),
        QuantConfig(activation=ActivationQuant(format="fp8_e4m3", method="static")),
    ],
)
def test_only_sums_of_bytes_have_steps(config: QuantConfig) -> None:
    layer, _ = prepared("linear", config)
    assert layer.terms()[1] is layer.bias


def test_without_grids_there_are_no_steps() -> None:
    layer, _ = prepared("linear")
    fxslim.quantization.switch_quantizers(layer, False)
    assert layer.terms()[1] is layer.bias
    fresh = fxslim.nn.LinearQAT(4, 2, config="int8").eval()
    assert fresh.terms()[1] is fresh.bias
    alone = fxslim.nn.LinearQAT(4, 2, config="w4").eval()
    assert alone.terms()[1] is alone.bias


def test_what_int32_does_not_hold_stays() -> None:
    layer, x = prepared("linear")
    with torch.no_grad():
        layer.weight[3] *= 1e-9
        layer.bias[3] = 2.5
    bias = layer.terms()[1]
    assert float(bias[3].detach()) == 2.5
    assert not torch.equal(bias[2], layer.bias[2])
    assert float(layer.to_deploy().bias[3]) == 2.5
    assert bool(layer(x).isfinite().all())


class Normed(nn.Module):
    """A convolution, its norm, and a second one that reads what the first activation's quantizer gives."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        return self.left(x) * self.right(x)


def normed(bias: bool = False, **wishes: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    model, x = Normed(bias).double(), torch.randn(4, 3, 9, 9).double()
    return fxslim.quantize(model.eval(), "int8", data=[x], example_inputs=x, **wishes), x


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_behind_is_part_of_the_sums(bias: bool, fold: bool) -> None:
    """What the norm gives is whole steps of the folded weight's sums: products and biases alike."""
    model, x = normed(bias, fold_batch_norms=fold)
    factor = model.norm.weight * torch.rsqrt(model.norm.running_var + model.norm.eps)
    step = input_scale(model.conv) * (model.conv.scale * factor.abs())
    sums = model.norm(model.conv(x))
    assert whole(sums, step.reshape(1, -1, 1, 1))
    alone = fxslim.nn.Conv2dQAT.to_deploy(model.conv, norm=model.norm)
    torch.testing.assert_close(alone(x), sums, rtol=1e-6, atol=1e-6)


def test_a_norm_that_lets_nothing_pass() -> None:
    model, x = normed()
    with torch.no_grad():
        model.norm.weight[2] = 0
    assert bool(model(x).isfinite().all())
    torch.testing.assert_close(model.norm(model.conv(x))[:, 2], model.norm.bias[2].expand(4, 7, 7))


def test_inputs_that_come_quantized() -> None:
    """Two layers read one quantizer's output, which is not theirs."""
    model, _ = normed()
    assert model.left.input_quantizer is None
    step = model.relu.output_quantizer.grid()[0] * model.left.scale
    assert whole(model.left.terms()[1], step)
    assert model.relu.output_quantizer not in set(model.left.modules())


def test_copies_look_at_their_own_neighbours(tmp_path: Path) -> None:
    model, x = normed()
    wanted = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for quantizer in (model.relu.output_quantizer, model.conv.input_quantizer):
            quantizer.scale *= 3
        model.norm.running_mean += 1
    assert torch.equal(twin(x), wanted)
    fxslim.save(twin, tmp_path / "m")
    loaded = fxslim.load(Normed(False).double(), tmp_path / "m").eval()
    assert torch.equal(loaded(x), wanted)
    assert set(loaded.state_dict()) == set(twin.state_dict())


def test_compiled_and_exported_code_adds_the_same() -> None:
    model, x = normed(bias=True)
    with torch.no_grad():
        wanted = model(x)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), wanted)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted)


def test_self_attention() -> None:
    torch.manual_seed(0)
    model, x = fxslim.nn.MultiheadAttentionQAT(8, 2, batch_first=True, config="int8"), torch.randn(2, 5, 8)
    nn.init.normal_(model.in_proj_bias)
    with fxslim.calibrating(model):
        model(x, x, x)
    model.eval()
    biases: list[Tensor] = []

    def seen(module: Any, scales: Any, same: Any) -> Tensor:
        biases.append(kept(module, scales, same))
        return biases[-1]

    from fxslim.nn import qat_attention

    kept = qat_attention.projection_bias
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat_attention, "projection_bias", seen)
        model(x, x, x)
        other = x + 1
        model(x, other, other)
    step = input_scale(model) * model.scale
    assert whole(biases[0], step)
    parts = [input_scale(model, name) for name in model.input_names]
    assert whole(biases[1], torch.cat([one * two for one, two in zip(parts, model.scale.chunk(3), strict=True)]))
    assert isinstance(model, QuantizedLayer)
