# SPDX-License-Identifier: Apache-2.0
"""Layers of bytes without zero blocks give what their counterparts simulate, within a step."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim.errors import UnsupportedLayerError
from fxslim.nn import ActivationQuant, Int8BlockSparseConv2d, Int8BlockSparseLinear, QuantConfig, WeightQuant
from fxslim.patterns import Block
from tests.nn.block_sparse_cases import convolutions, masked, patterns

CONFIGS: dict[str, Any] = {
    "int8": "int8",
    "w7a8": "w7a8",
    "w4a8": "w4a8",
    "w3a3": "w3a3",
    "symmetric": QuantConfig(activation=ActivationQuant(symmetric=True)),
    "signed": QuantConfig(activation=ActivationQuant(signed=True)),
    "one scale": QuantConfig(weight=WeightQuant(granularity="tensor")),
    "lsq": QuantConfig(weight=WeightQuant(method="lsq", bits=5), activation=ActivationQuant(method="lsq")),
}
TARGETS = {"symmetric": "tensorrt", "signed": "ascend"}
configs = st.sampled_from(sorted(CONFIGS))


def ready(layer: nn.Module, name: str, x: Tensor) -> Any:
    """A quantized layer with ranges."""
    target = TARGETS.get(name, "onnxruntime")
    return fxslim.quantize(layer, CONFIGS[name], data=[x], calibration="min_max", target=target).eval()


def step_of(layer: Any) -> Tensor:
    """One step of the output; without a grid of its own one of an input times one of a weight."""
    if layer.output_quantizer is not None:
        return layer.output_quantizer.scale.detach()
    return layer.input_quantizer.scale.detach() * layer.scale.detach().max()


def assert_within_a_step(layer: Any, sparse: Any, x: Tensor, relu: bool) -> None:
    with torch.no_grad():
        expected, found = layer(x), sparse(x)
    if relu:
        expected = expected.relu()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert not found.numel() or (found - expected).abs().max() <= step_of(layer) + 1e-6 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(name=configs, case=convolutions(), relu=st.booleans(), seed=st.integers(0, 99))
def test_convolutions(name: str, case: tuple[nn.Conv2d, Tensor, Block], relu: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x, pattern = case
    given_x = torch.randn(2, *x.shape[1:])
    layer = ready(masked(layer, pattern), name, given_x)
    sparse = Int8BlockSparseConv2d(layer, pattern=pattern, relu=relu)
    assert_within_a_step(layer, sparse, 1.5 * x, relu)
    assert torch.equal(sparse.weight(torch.float32) != 0, layer.computed() != 0)


@given(
    name=configs, inputs=st.integers(1, 70), outputs=st.integers(1, 70), rows=st.lists(st.integers(0, 4), max_size=2),
    pattern=patterns(), bias=st.booleans(), relu=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_layers(
    name: str, inputs: int, outputs: int, rows: list[int], pattern: Block, bias: bool, relu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = ready(masked(nn.Linear(inputs, outputs, bias), pattern), name, torch.randn(5, inputs))
    sparse = Int8BlockSparseLinear(layer, pattern=pattern, relu=relu)
    assert_within_a_step(layer, sparse, 1.5 * torch.randn(*rows, inputs), relu)


def int8_conv() -> tuple[Any, Tensor]:
    """Its output has no grid."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 6, 6)
    return ready(masked(nn.Conv2d(64, 64, 3), Block(ratio=0.5)), "symmetric", x), x


def test_norms_become_part() -> None:
    layer, x = int8_conv()
    norm = nn.BatchNorm2d(64).eval()
    for state in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        nn.init.uniform_(state, 0.5, 1.5)
    norm.weight.data[::2] *= -1
    sparse = Int8BlockSparseConv2d(layer, norm)
    with torch.no_grad():
        expected, found = norm(layer(x)), sparse(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sparse.kernel == "block-sparse int8, 9 of 18 blocks"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_inputs_of_other_types(dtype: torch.dtype) -> None:
    layer, x = int8_conv()
    sparse = Int8BlockSparseConv2d(layer)
    with torch.no_grad():
        expected, found = sparse(x.to(dtype).float()), sparse(x.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= step_of(layer) + 4 * torch.finfo(dtype).eps


def test_compiled_and_exported_code_computes_in_float() -> None:
    layer, x = int8_conv()
    sparse = Int8BlockSparseConv2d(layer, relu=True)
    with torch.no_grad():
        expected = sparse(x)
        for found in (
            torch.export.export(sparse, (x,)).module()(x),
            torch.compile(sparse, fullgraph=True, backend="aot_eager")(x),
        ):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_copies_pickles_and_states() -> None:
    layer, x = int8_conv()
    sparse = Int8BlockSparseConv2d(layer)
    with torch.no_grad():
        y = sparse(x)
        assert torch.equal(copy.deepcopy(sparse)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(sparse))(x), y)
        room = Int8BlockSparseConv2d(layer, num_blocks=9)
        room.load_state_dict(sparse.state_dict())
        assert torch.equal(room(x), y)
    assert sparse.weight.blocks.dtype == torch.int8


def test_models_in_channels_last() -> None:
    layer, x = int8_conv()
    sparse = Int8BlockSparseConv2d(layer)
    with torch.no_grad():
        y = sparse(x)
        sparse.to(memory_format=torch.channels_last)
        assert torch.equal(sparse(x.to(memory_format=torch.channels_last)), y)


@pytest.mark.parametrize("config", ["w8", "w16a16", "fp8"])
def test_what_has_no_bytes_is_refused(config: str) -> None:
    layer = fxslim.quantize(nn.Linear(8, 8), config, data=[torch.randn(2, 8)])
    with pytest.raises(UnsupportedLayerError, match="Int8BlockSparseLinear takes layers without groups whose inputs"):
        Int8BlockSparseLinear(layer)
