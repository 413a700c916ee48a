# SPDX-License-Identifier: Apache-2.0
"""Torch's transformer layers in evaluation: the fused path must not go past the quantizers."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fxslim.nn import LinearQAT, MultiheadAttentionQAT, QuantConfig
from tests.nn.quantized.quantized_layers import weights_only

SETTINGS: dict[str, Any] = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}


def put_in(layer: Any, which: str, config: Any) -> None:
    if which in ("attention", "all"):
        layer.self_attn = MultiheadAttentionQAT.from_float(layer.self_attn, config=config)
    if which in ("linear", "all"):
        layer.linear1 = LinearQAT.from_float(layer.linear1, config=config)
        layer.linear2 = LinearQAT.from_float(layer.linear2, config=config)


def with_quantized_weights(model: nn.Module) -> nn.Module:
    """A plain copy that holds the quantized weights."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for module in [m for m in plain.modules() if isinstance(m, LinearQAT | MultiheadAttentionQAT)]:
            for name in module.maskable:
                module.stored(name).copy_(module.computed(name))
    for name, module in list(plain.named_modules()):
        if isinstance(module, LinearQAT | MultiheadAttentionQAT) and not name.endswith("out_proj"):
            parent, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(parent), attribute, module.to_float())
    return plain


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("which", ["attention", "linear", "all"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_alone(norm_first: bool, which: str, mode: Any) -> None:
    layer = nn.TransformerEncoderLayer(**SETTINGS, norm_first=norm_first).eval()
    dense = copy.deepcopy(layer)
    put_in(layer, which, weights_only(bits=3))
    plain, x = with_quantized_weights(layer), torch.randn(3, 5, 8)
    with mode():
        got = layer(x)
        torch.testing.assert_close(got, plain(x))
        assert not torch.allclose(got, dense(x), atol=1e-4)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        torch.testing.assert_close(layer(x, causal, is_causal=True), plain(x, causal, is_causal=True))


@pytest.mark.parametrize("which", ["attention", "linear", "all"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders(which: str, padded: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**SETTINGS), 2).eval()
    for layer in model.layers:
        put_in(layer, which, weights_only(bits=3))
    model.use_nested_tensor = False
    plain, x = with_quantized_weights(model), torch.randn(3, 5, 8)
    padding = torch.arange(5)[None] >= torch.tensor([5, 3, 2])[:, None] if padded else None
    with torch.no_grad():
        got, want = model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding)
    real = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(got[real], want[real])


def test_activations_are_calibrated_and_used() -> None:
    layer: Any = nn.TransformerEncoderLayer(**SETTINGS)
    put_in(layer, "all", QuantConfig.from_dict({"weight": None, "activation": {"bits": 2}}))
    x = torch.randn(3, 5, 8)
    layer(x)
    layer.eval()
    with torch.no_grad():
        got = layer(x)
        for quantizer in (layer.self_attn.input_quantizer, layer.linear1.input_quantizer):
            assert quantizer.is_calibrated
            quantizer.enabled = False
        assert not torch.allclose(layer(x), got)
