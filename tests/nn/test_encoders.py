# SPDX-License-Identifier: Apache-2.0
"""Torch's transformer layers with masks: the fused path and nested tensors of evaluation must not go past the masks."""

import copy

import pytest
import torch
from torch import nn

import fxslim

SETTINGS = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}


def encoder(norm_first: bool = False, activation: str = "relu", **settings) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**{**SETTINGS, **settings}, norm_first=norm_first, activation=activation)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("skip", [(), ("*out_proj",), ("*self_attn*",), ("*linear*",), ("*1*",)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_in_evaluation(norm_first: bool, activation: str, skip: tuple[str, ...], padded: bool) -> None:
    model = fxslim.sparsify(encoder(norm_first, activation), "2:4", skip=skip).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None] if padded else None
    baked = fxslim.sparsity.bake(copy.deepcopy(model))
    slow = baked(x, src_key_padding_mask=padding)
    with torch.no_grad():
        got, fast = model(x, src_key_padding_mask=padding), baked(x, src_key_padding_mask=padding)
    real = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    # Nested tensors write 0 where there is padding, or shorten the batch.
    torch.testing.assert_close(got[real], slow[real])
    torch.testing.assert_close(got[real], fast[real[:, : fast.shape[1]]])
    dense = encoder(norm_first, activation).eval()
    dense.load_state_dict({name: value for name, value in model.state_dict().items() if not name.endswith("_mask")})
    assert not torch.allclose(got[real], dense(x, src_key_padding_mask=padding)[real])


def test_a_layer_alone_and_its_causal_mask() -> None:
    layer = fxslim.sparsify(nn.Sequential(nn.TransformerEncoderLayer(**SETTINGS)), "2:4").eval()[0]
    baked = fxslim.sparsity.bake(copy.deepcopy(layer))
    x, causal = torch.randn(3, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), baked(x))
        torch.testing.assert_close(layer(x, causal, is_causal=True), baked(x, causal, is_causal=True))


def test_a_whole_transformer() -> None:
    settings = {**SETTINGS, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = fxslim.sparsify(nn.Transformer(**settings), "2:4").eval()
    baked = fxslim.sparsity.bake(copy.deepcopy(model))
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 5])
    settings = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    with torch.no_grad():
        torch.testing.assert_close(model(source, target, **settings), baked(source, target, **settings))


@pytest.mark.parametrize("padded", [False, True])
def test_masks_put_on_by_hand_in_an_encoder_count_too(padded: bool) -> None:
    """from_float of the attention alone, without a plan."""
    model = encoder().eval()
    for layer in model.layers:
        layer.self_attn = fxslim.nn.MaskedMultiheadAttention.from_float(layer.self_attn, pattern="2:4")
    plain = copy.deepcopy(model)
    for layer in plain.layers:
        layer.self_attn = layer.self_attn.to_float()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None] if padded else None
    model.use_nested_tensor = False
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding)
    want = plain(x, src_key_padding_mask=padding)
    real = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(got[real], want[real])
