# SPDX-License-Identifier: Apache-2.0
"""Block-sparse layers compute what the masked layers compute, in every shape, layout and type."""

import copy
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxslim.errors import ConfigError, DtypeError, UnsupportedLayerError
from fxslim.nn import BlockSparseConv2d, BlockSparseLinear
from fxslim.nn.packed_blocks import PackedBlocks
from fxslim.patterns import Block
from tests.nn.block_sparse_cases import assert_close, convolutions, masked, patterns

MODES = ("zeros", "zeros", "reflect", "replicate", "circular")


def half_zero(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight[:, : layer.weight.shape[1] // 2] = 0
    return layer


def sparse_conv(**settings: Any) -> BlockSparseConv2d:
    return BlockSparseConv2d(half_zero(nn.Conv2d(64, 64, 3, **settings)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@given(case=convolutions(MODES), relu=st.booleans(), seed=st.integers(0, 99))
def test_convolutions(case: tuple[nn.Conv2d, Tensor, Block], relu: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x, pattern = case
    layer = masked(layer, pattern)
    if not len(x) and layer.padding_mode != "zeros":
        x = x.new_ones(1, *x.shape[1:])
    sparse = BlockSparseConv2d(layer, pattern=pattern, relu=relu)
    with torch.no_grad():
        expected = layer(x)
        found = sparse(x)
    assert_close(found, expected.relu() if relu else expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sparse.weight(torch.float32), layer.masked())


@given(
    inputs=st.integers(1, 70), outputs=st.integers(1, 70), rows=st.lists(st.integers(0, 4), max_size=3),
    pattern=patterns(), bias=st.booleans(), relu=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_layers(
    inputs: int, outputs: int, rows: list[int], pattern: Block, bias: bool, relu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, x = masked(nn.Linear(inputs, outputs, bias), pattern), torch.randn(*rows, inputs)
    with torch.no_grad():
        expected = layer(x)
    assert_close(BlockSparseLinear(layer, pattern=pattern, relu=relu)(x), expected.relu() if relu else expected)


@given(case=convolutions(), relu=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_norms_become_part(case: tuple[nn.Conv2d, Tensor, Block], relu: bool, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x, pattern = case
    layer, norm = masked(layer, pattern), nn.BatchNorm2d(layer.out_channels, affine=bias).eval()
    for state in norm.state_dict().values():
        if state.is_floating_point():
            nn.init.uniform_(state, 0.5, 1.5)
    with torch.no_grad():
        expected = norm(layer(x))
        found = BlockSparseConv2d(layer, norm, pattern=pattern, relu=relu)(x)
    assert_close(found, expected.relu() if relu else expected)


def test_an_input_without_a_batch() -> None:
    layer, x = half_zero(nn.Conv2d(64, 64, 3, padding=1)), torch.randn(64, 8, 8)
    assert_close(BlockSparseConv2d(layer)(x), layer(x))


@pytest.mark.parametrize("inputs", [0, 1, 64])
def test_weights_of_zeros(inputs: int) -> None:
    layer = nn.Linear(64, 32)
    nn.init.zeros_(layer.weight)
    sparse = BlockSparseLinear(layer)
    assert sparse.weight.num_blocks == 0
    assert torch.equal(sparse(torch.randn(inputs, 64)), layer.bias.expand(inputs, 32))


@pytest.mark.parametrize(
    ("dtype", "moved"),
    [(torch.float64, True), (torch.float64, False), (torch.bfloat16, False), (torch.float16, False)],
)
def test_types_without_a_kernel_are_dense_and_said_once(
    dtype: torch.dtype, moved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = half_zero(nn.Conv2d(64, 64, 3)), torch.randn(1, 64, 8, 8)
    sparse = BlockSparseConv2d(layer, relu=True)
    sparse.layer_name = "block.conv1"
    if moved:
        sparse.to(dtype)
    with caplog.at_level(logging.WARNING, "fxslim"), torch.no_grad():
        found = [sparse(x.to(dtype)) for _ in range(2)]
        expected = layer(x).relu()
    assert all(one.dtype == dtype for one in found)
    assert (found[1].double() - expected).abs().max() <= 32 * torch.finfo(dtype).eps + 1e-5
    assert [record.getMessage() for record in caplog.records] == [
        f"block.conv1: no block-sparse kernel for {dtype} on cpu: its whole weight is put together in each forward, "
        "which is slower than a dense layer"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_kernel(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    layer, x = half_zero(nn.Conv2d(64, 64, 3)), torch.randn(1, 64, 8, 8)
    sparse = BlockSparseConv2d(layer, relu=True).to(dtype)
    with caplog.at_level(logging.WARNING, "fxslim"), torch.no_grad():
        found = sparse(x.to(dtype))
        expected = layer(x).relu()
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= 32 * torch.finfo(dtype).eps
    assert not caplog.records


def test_a_float32_input_of_a_layer_of_another_type() -> None:
    sparse, x = sparse_conv().double(), torch.randn(1, 64, 8, 8)
    assert_close(sparse(x), sparse(x.double()).float())


@pytest.mark.parametrize("batch", [0, 2])
def test_compiled_and_exported(batch: int) -> None:
    x = torch.randn(batch, 64, 8, 8)
    model = nn.Sequential(
        sparse_conv(padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        BlockSparseLinear(half_zero(nn.Linear(256, 32))),
    )  # fmt: skip
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x), expected)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("block_sparse_conv2d" in target for target in targets) == (2 if batch else 1)


def test_any_number_of_pictures_after_export() -> None:
    model, x = sparse_conv(), torch.randn(2, 64, 8, 8)
    shapes = {"input": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        more = torch.randn(5, 64, 8, 8)
        assert torch.equal(exported(more), model(more))


def test_compiled_without_a_kernel() -> None:
    model, x = sparse_conv().double(), torch.randn(1, 64, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), 1e-12)
        assert_close(torch.export.export(model, (x,)).module()(x), model(x), 1e-12)


def test_copies_pickles_and_states() -> None:
    layer, x = sparse_conv(), torch.randn(1, 64, 8, 8)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other, file = sparse_conv(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)
    room = BlockSparseConv2d(nn.Conv2d(64, 64, 3), num_blocks=9)
    room.load_state_dict(layer.state_dict())
    assert torch.equal(room(x), y)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight\.blocks"):
        BlockSparseConv2d(nn.Conv2d(64, 64, 3)).load_state_dict(layer.state_dict())


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3)), pattern=patterns(),
    dtype=st.sampled_from([torch.float32, torch.int8]),
)  # fmt: skip
def test_room_for_blocks_has_their_shapes(shape: tuple[int, ...], pattern: Block, dtype: torch.dtype) -> None:
    packed = PackedBlocks(torch.ones(shape, dtype=dtype), pattern)
    room = PackedBlocks(torch.ones(shape, dtype=dtype), pattern, num_blocks=packed.num_blocks)
    for name, state in packed.state_dict().items():
        found = room.state_dict()[name]
        assert (found.shape, found.dtype) == (state.shape, state.dtype)
    assert room(torch.float32).shape == shape


def test_no_gradients_and_the_same_in_training() -> None:
    layer, x = sparse_conv(), torch.randn(1, 64, 8, 8, requires_grad=True)
    y = layer.train()(x)
    assert not list(layer.parameters())
    assert not y.requires_grad
    assert torch.equal(layer.eval()(x), y)
    # What is added in place may learn.
    scale = torch.ones((), requires_grad=True)
    layer(x).add_(scale).sum().backward()
    assert scale.grad == y.numel()


def test_on_the_meta_device() -> None:
    room = BlockSparseConv2d(nn.Conv2d(64, 64, 3, device="meta"), num_blocks=9)
    assert room.weight.blocks.shape == sparse_conv().weight.blocks.shape
    layer = sparse_conv(stride=2).to("meta")
    assert layer(torch.empty(2, 64, 9, 9, device="meta")).shape == (2, 64, 4, 4)


@pytest.mark.parametrize("before", [False, True])
def test_models_in_channels_last(before: bool) -> None:
    dense, x = half_zero(nn.Conv2d(64, 64, 3)), torch.randn(1, 64, 8, 8)
    expected = dense(x)
    if before:
        dense.to(memory_format=torch.channels_last)
    layer = BlockSparseConv2d(dense).to(memory_format=torch.channels_last)
    assert layer.weight.blocks.is_contiguous()
    assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    # Sharing memory changes the tensors that are there.
    assert layer.share_memory().weight.blocks.is_shared()
    assert layer.to_empty(device="meta").weight.blocks.is_meta


def test_encoders_of_torch_call_the_layers() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    half_zero(encoder.linear1)
    with torch.no_grad():
        expected = encoder(x)
        encoder.linear1 = BlockSparseLinear(encoder.linear1, pattern=Block(cin=8, cout=8))
        assert_close(encoder(x), expected)


def test_what_is_refused() -> None:
    layer = sparse_conv()
    with pytest.raises(ConfigError, match=r"BlockSparseConv2d takes inputs of 64 channels, .* got shape \(1, 32, 8, 8"):
        layer(torch.randn(1, 32, 8, 8))
    with pytest.raises(ConfigError, match=r"got shape \(64, 8\)"):
        layer(torch.randn(64, 8))
    with pytest.raises(ConfigError, match="smaller than the kernel"):
        layer(torch.randn(1, 64, 2, 8))
    with pytest.raises(DtypeError, match=r"takes floating-point inputs, got torch\.int64"):
        layer(torch.ones(1, 64, 8, 8, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"BlockSparseConv2d takes layers of one group, got 2"):
        BlockSparseConv2d(nn.Conv2d(64, 64, 3, groups=2))
    linear = BlockSparseLinear(nn.Linear(64, 8))
    with pytest.raises(ConfigError, match=r"takes inputs of 64 features, got shape \(2, 8\)"):
        linear(torch.randn(2, 8))
    with pytest.raises(UnsupportedLayerError, match="takes no nested tensors: pad them"):
        linear(torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(3, 64)]))


def test_infinities_and_nan_stay_visible() -> None:
    layer = half_zero(nn.Conv2d(64, 64, 1, bias=False))
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
        found = BlockSparseConv2d(layer, relu=True)(torch.ones(1, 64, 2, 2))
        expected = F.conv2d(torch.ones(1, 64, 2, 2), layer.weight).relu()
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()
