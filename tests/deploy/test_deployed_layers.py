# SPDX-License-Identifier: Apache-2.0
"""Deployed layers give what their counterparts simulate: within a step, at extremes, in every shape."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim.errors import CalibrationError, ConfigError, DtypeError, UnsupportedLayerError
from fxslim.nn import (
    ActivationQuant,
    Conv2dQAT,
    EmbeddingQAT,
    HandedOverLinearQAT,
    LinearQAT,
    QuantConfig,
    QuantizedLayer,
    WeightQuant,
)
from fxslim.nn.byte_products import EXACT, IN_HALVES, NONE, sums_of_this_cpu

# Configs that are computed in integers, and others.
IN_INTEGERS: dict[str, Any] = {
    "int8": "int8",
    "w7a8": "w7a8",
    "w4a8": "w4a8",
    "w3a3": "w3a3",
    "signed": QuantConfig(activation=ActivationQuant(signed=True)),
    "symmetric": QuantConfig(activation=ActivationQuant(symmetric=True)),
    "one scale": QuantConfig(weight=WeightQuant(granularity="tensor")),
    "lsq": QuantConfig(weight=WeightQuant(method="lsq", bits=5), activation=ActivationQuant(method="lsq")),
    "binary": QuantConfig(weight=WeightQuant(method="binary", bits=1)),
}
IN_FLOAT: dict[str, Any] = {
    "w8": "w8",
    "w4": "w4",
    "w16a16": "w16a16",
    "dorefa": QuantConfig(weight=WeightQuant(method="dorefa", granularity="tensor")),
    "fp8": "fp8",
    "fp4 weights": QuantConfig(weight=WeightQuant(format="fp4_e2m1"), activation=None),
    "inputs alone": QuantConfig(weight=None),
}
EVERY = IN_INTEGERS | IN_FLOAT
configs = st.sampled_from(sorted(EVERY))


def ready(layer: nn.Module, config: Any, *inputs: Tensor) -> QuantizedLayer:
    """A counterpart with ranges."""
    activation = getattr(config, "activation", None)
    target = "onnxruntime"
    if activation is not None and (activation.signed or activation.symmetric):
        target = "tensorrt" if activation.symmetric else "ascend"
    return fxslim.quantize(layer, config, data=list(inputs), calibration="min_max", target=target).eval()


def output_step(layer: Any) -> Tensor:
    """One step of the output; without a grid one step of an input times one of a weight; without these, rounding."""
    if layer.output_quantizer is not None:
        return layer.output_quantizer.scale.detach()
    if layer.input_quantizer is None or layer.weight_quantizer is None:
        return torch.tensor(1e-5)
    return layer.input_quantizer.scale.detach() * layer.scale.detach().max()


def assert_within_a_step(layer: Any, x: Tensor) -> nn.Module:
    deployed = layer.to_deploy()
    with torch.no_grad():
        one, two = layer(x), deployed(x)
    assert one.shape == two.shape
    assert one.dtype == two.dtype
    tolerance = output_step(layer) + 1e-6 * one.abs().max()
    assert (one - two).abs().max() <= tolerance
    return deployed


@given(
    name=configs, inputs=st.integers(1, 40), outputs=st.integers(1, 20), rows=st.lists(st.integers(1, 4), max_size=2),
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_layers(name: str, inputs: int, outputs: int, rows: list[int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*rows, inputs)
    layer = ready(nn.Linear(inputs, outputs, bias), EVERY[name], x)
    assert_within_a_step(layer, 1.5 * torch.randn(*rows, inputs))


@st.composite
def convolutions(draw: Any) -> tuple[nn.Conv2d, Tensor]:
    """Any kernel, stride, padding, dilation and groups, and an input."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel, dilation = ([draw(st.integers(1, 3)) for _ in range(2)] for _ in range(2))
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    padding: Any = draw(st.sampled_from(["same", "valid", 0, 1, (2, 0)]))
    if padding == "same":
        stride = [1, 1]
    inputs, outputs = draw(st.integers(1, 9)) * groups, draw(st.integers(1, 9)) * groups
    layer = nn.Conv2d(
        inputs, outputs, tuple(kernel), tuple(stride), padding, tuple(dilation), groups, bias=draw(st.booleans())
    )
    x = torch.randn(draw(st.integers(1, 3)), inputs, draw(st.integers(7, 12)), draw(st.integers(7, 12)))
    return layer, x.to(memory_format=torch.channels_last) if draw(st.booleans()) else x


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(name=configs, case=convolutions(), seed=st.integers(0, 99))
def test_convolutions(name: str, case: tuple[nn.Conv2d, Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = case
    assert_within_a_step(ready(layer, EVERY[name], x), 1.5 * x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(6, 8, 3, 2), lambda: nn.Conv3d(4, 6, 2), lambda: nn.ConvTranspose1d(6, 8, 3, groups=2),
        lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, 1, groups=2), lambda: nn.ConvTranspose3d(4, 6, 2),
    ],
    ids=["Conv1d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"],
)  # fmt: skip
@pytest.mark.parametrize("config", ["int8", "w4"])
def test_other_convolutions(make: Any, config: str) -> None:
    layer = make()
    x = torch.randn(2, layer.in_channels, *[6] * len(layer.kernel_size))
    deployed = assert_within_a_step(ready(layer, config, x), x)
    assert deployed.kernel == NONE


def test_a_transposed_convolution_is_asked_for_a_size() -> None:
    x = torch.randn(1, 3, 5, 5)
    layer: Any = ready(nn.ConvTranspose2d(3, 4, 3, stride=2), "int8", x)
    with torch.no_grad():
        assert torch.equal(layer.to_deploy()(x, [12, 12]), layer(x, [12, 12]))


@pytest.mark.parametrize("config", ["int8", "w7a8", "w4"])
@pytest.mark.parametrize("settings", [{}, {"batch_first": True, "add_bias_kv": True}, {"kdim": 6, "vdim": 10}])
def test_attention(config: str, settings: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(16, 4, **settings)
    x = torch.randn(5, 3, 16)
    key, value = (torch.randn(5, 3, size) for size in (6, 10)) if "kdim" in settings else (x, x)
    inputs = fxslim.Inputs(x, key, value)
    attention = fxslim.quantize(layer, config, data=[inputs], forward=lambda model, one: one.run(model)).eval()
    deployed = attention.to_deploy()
    with torch.no_grad():
        for one, two in zip(attention(x, key, value), deployed(x, key, value), strict=True):
            assert (one - two).abs().max() < 1e-5
    expected = NONE if config == "w4" else EXACT if config == "w7a8" else IN_HALVES
    assert deployed.q_proj.kernel in (expected, EXACT)


@pytest.mark.parametrize("config", ["w8", "w4", "w16"])
def test_embeddings_make_the_rows_that_are_asked_for(config: str) -> None:
    layer = EmbeddingQAT.from_float(nn.Embedding(10, 5), config)
    indices = torch.tensor([[0, 3], [9, 3]])
    with torch.no_grad():
        assert torch.equal(layer.to_deploy()(indices), layer(indices))
    with pytest.raises(DtypeError, match=r"takes indices, got torch\.float32"):
        layer.to_deploy()(torch.zeros(2))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("least", [-1.0, 1.0])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_sums_are_exact_at_extremes(signed: bool, least: float, kind: str) -> None:
    """All inputs are the largest integer of their grid, and all weights -128 or 127."""
    torch.manual_seed(0)
    config = QuantConfig(weight=WeightQuant(method="lsq"), activation=ActivationQuant(signed=signed))
    layer: Any = nn.Linear(512, 16) if kind == "linear" else nn.Conv2d(64, 16, 3)
    nn.init.constant_(layer.weight, least)
    nn.init.zeros_(layer.bias)
    x = torch.ones(4, 512) if kind == "linear" else torch.ones(2, 64, 5, 5)
    quantized: Any = ready(layer, config, x, torch.zeros_like(x))
    with torch.no_grad():
        quantized(x)
        quantized.weight_quantizer.scale.fill_(1 / 128)
    deployed = assert_within_a_step(quantized, x)
    assert deployed.weight.values.unique().tolist() == ([-128] if least < 0 else [127])
    assert sums_of_this_cpu() == "none" or deployed.kernel == (EXACT if sums_of_this_cpu() == "wide" else IN_HALVES)
    with torch.no_grad():
        assert deployed(x).mean().item() == pytest.approx(
            576 * least if kind == "convolution" else 512 * least, rel=0.01
        )


@pytest.mark.parametrize("config", ["w7a8", "w8a7", "w4a8"])
def test_small_weights_or_inputs_need_no_halves(config: str) -> None:
    deployed = ready(nn.Linear(64, 8), config, torch.randn(4, 64)).to_deploy()
    assert deployed.kernel == (NONE if sums_of_this_cpu() == "none" else EXACT)


def test_packed_weights_follow_the_stored_ones() -> None:
    x = torch.randn(4, 16)
    deployed = ready(nn.Linear(16, 8), "int8", x).to_deploy()
    other = ready(nn.Linear(16, 8), "int8", x).to_deploy()
    with torch.no_grad():
        deployed(x)
        deployed.load_state_dict(other.state_dict())
        assert torch.equal(deployed(x), other(x))
        deployed.bias.add_(1)
        assert torch.allclose(deployed.computed(x), other.computed(x) + 1, atol=1e-5)


def test_copies_and_pickles_compute_the_same() -> None:
    x = torch.randn(4, 16)
    deployed = ready(nn.Linear(16, 8), "int8", x).to_deploy()
    with torch.no_grad():
        y = deployed(x)
        assert torch.equal(copy.deepcopy(deployed)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_inputs_of_other_types(dtype: torch.dtype) -> None:
    x = torch.randn(4, 16, dtype=dtype)
    layer = ready(nn.Linear(16, 8).to(dtype), "int8", x)
    with torch.no_grad():
        one, two = layer(x), layer.to_deploy()(x)
    assert two.dtype == dtype
    assert (one.double() - two.double()).abs().max() <= output_step(layer) + 8 * torch.finfo(dtype).eps


def test_nothing_in_nothing_out() -> None:
    deployed = ready(nn.Linear(16, 8), "int8", torch.randn(4, 16)).to_deploy()
    assert deployed(torch.zeros(0, 16)).shape == (0, 8)


def test_numbers_of_4_bits_are_two_to_a_byte() -> None:
    deployed = LinearQAT(7, 6, config="w4").to_deploy()
    assert deployed.weight.values.shape == (6, 4)
    assert deployed.weight.rows().shape == (6, 7)


def test_what_layers_refuse() -> None:
    x = torch.randn(1, 3, 8, 8)
    convolution = ready(nn.Conv2d(3, 4, 3), "int8", x).to_deploy()
    with pytest.raises(ConfigError, match=r"takes inputs of 4 dims, got \(3, 8, 8\)"):
        convolution(x[0])
    with pytest.raises(DtypeError, match=r"takes floating-point inputs, got torch\.uint8"):
        convolution(x.to(torch.uint8))
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(UnsupportedLayerError, match="takes no nested tensors: pad them"):
        ready(nn.Linear(8, 2), "int8", torch.randn(4, 8)).to_deploy()(nested)


def test_layers_that_are_not_ready_say_what_is_missing() -> None:
    layer = Conv2dQAT(3, 4, 3, config=QuantConfig(activation=ActivationQuant(batch_num=3)))
    layer(torch.randn(1, 3, 8, 8))
    with pytest.raises(CalibrationError, match="the input of Conv2dQAT has seen 1 of 3 batches: train on 2 more"):
        layer.to_deploy()
    layer = LinearQAT(3, 4, config="w8")
    fxslim.quantization.switch_quantizers(layer, False)
    with pytest.raises(CalibrationError, match="the weight of LinearQAT is switched off"):
        layer.to_deploy()
    with pytest.raises(UnsupportedLayerError, match="its weight is read as a float tensor by the module"):
        HandedOverLinearQAT(3, 4, config="w8").to_deploy()
