# SPDX-License-Identifier: Apache-2.0
"""MultiheadAttentionQAT beside nn.MultiheadAttention in all its modes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim import ConfigError
from fxslim.nn import ActivationQuant, MultiheadAttentionQAT, QuantConfig, WeightQuant
from tests.nn.quantized.quantized_layers import NOTHING, seeds, weights_only


@st.composite
def attentions(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, dict[str, Any]]:
    """A plain layer with any of its arguments, and those of its forward."""
    torch.manual_seed(draw(seeds))
    width, (queries, keys) = 8, (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    kdim, vdim = (draw(st.sampled_from([None, 6])) for _ in range(2))
    batch_first, batch = draw(st.booleans()), draw(st.sampled_from([None, 1, 3]))
    plain = nn.MultiheadAttention(
        width, 2, dropout=draw(st.sampled_from([0.0, 0.5])), bias=draw(st.booleans()), batch_first=batch_first,
        add_bias_kv=draw(st.booleans()), add_zero_attn=draw(st.booleans()), kdim=kdim, vdim=vdim, dtype=torch.float64,
    )  # fmt: skip

    def sequence(length: int, features: int) -> Tensor:
        sides = [length, features] if batch is None else [length, batch, features]
        x = torch.randn(sides, dtype=torch.float64)
        return x.transpose(0, 1) if batch_first and batch else x

    arguments: dict[str, Any] = {"query": sequence(queries, width)}
    if kdim is None and vdim is None and draw(st.booleans()):
        keys = queries
        arguments["key"] = arguments["value"] = arguments["query"]
    else:
        arguments |= {"key": sequence(keys, kdim or width), "value": sequence(keys, vdim or width)}
    arguments |= {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    if draw(st.booleans()):
        arguments["key_padding_mask"] = torch.rand([keys] if batch is None else [batch, keys]) < 0.3
    if draw(st.booleans()):
        arguments["attn_mask"] = torch.ones(queries, keys).triu(1).bool()
        arguments["is_causal"] = draw(st.booleans())
        if draw(st.booleans()):
            arguments["attn_mask"] = torch.randn([(batch or 1) * 2, queries, keys], dtype=torch.float64)
            arguments["is_causal"] = False
    return plain.train(draw(st.booleans())), arguments


def compare(layer: Any, plain: Any, arguments: dict[str, Any]) -> None:
    leaf, results = arguments["query"].requires_grad_(), []
    for module in (layer, plain):
        torch.manual_seed(0)
        leaf.grad = None
        module.zero_grad()
        output, attention = module(**arguments)
        output.sum().backward()
        own = {name: p.grad.clone() for name, p in module.named_parameters() if name in dict(plain.named_parameters())}
        results.append([output, attention, leaf.grad, *own.values()])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@given(case=attentions())
def test_with_nothing_quantized(case: tuple[nn.MultiheadAttention, dict[str, Any]]) -> None:
    plain, arguments = case
    compare(MultiheadAttentionQAT.from_float(plain, config=NOTHING), plain, arguments)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@given(case=attentions(), granularity=st.sampled_from(["tensor", "channel", "group"]))
def test_with_quantized_weights(case: tuple[nn.MultiheadAttention, dict[str, Any]], granularity: str) -> None:
    plain, arguments = case
    size = {"group_size": 2} if granularity == "group" else {}
    layer: Any = MultiheadAttentionQAT.from_float(plain, config=weights_only(bits=4, granularity=granularity, **size))
    twin: Any = MultiheadAttentionQAT.from_float(plain, config=NOTHING).to_float()
    for owner, other in ((layer, twin), (layer.out_proj, twin.out_proj)):
        for name in owner.maskable:
            shown = owner.computed(name).detach().clone()
            assert not torch.equal(shown, owner.stored(name))
            other.register_parameter(name, nn.Parameter(shown))
    compare(layer, twin, arguments)


def test_each_input_has_a_quantizer() -> None:
    """What is the same tensor is quantized once, by that of the query; the others see it, and have a range too."""
    config = QuantConfig(weight=None, activation=ActivationQuant(calibration="min_max"))
    x, memory = torch.randn(3, 2, 8), 5 * torch.randn(4, 2, 8)
    for inputs in ((x, x, x), (x, memory, memory), (x, memory, 2 * memory)):
        layer: Any = MultiheadAttentionQAT(8, 2, config=config)
        layer(*inputs)
        quantizers = (layer.input_quantizer, layer.key_quantizer, layer.value_quantizer)
        for quantizer, x_ in zip(quantizers, inputs, strict=True):
            assert quantizer.clip_max.item() == pytest.approx(x_.max().item())
        met: list[Any] = []
        for quantizer in quantizers:
            quantizer.register_forward_hook(lambda module, *_, met=met: met.append(module))
        layer(*inputs)
        assert len(met) == len({id(x_) for x_ in inputs})
        assert layer.out_proj.input_quantizer.is_calibrated


@pytest.mark.parametrize("vdim", [None, 6])
def test_a_whole_layer_is_its_formula(vdim: int | None) -> None:
    """Quantized inputs times quantized projections, attention in float, a quantized output projection."""
    activation = ActivationQuant(clip_min=-3.0, clip_max=3.0, bits=6)
    layer: Any = MultiheadAttentionQAT(
        8, 2, vdim=vdim, batch_first=True, config=QuantConfig(weight=WeightQuant(bits=4), activation=activation)
    ).double()
    x, value = torch.randn(2, 3, 8).double(), torch.randn(2, 3, vdim or 8).double()
    got, _ = layer(x, x, value)
    if vdim is None:
        wq, wk, wv = layer.computed("in_proj_weight").chunk(3)
    else:
        wq, wk, wv = (layer.computed(name) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    bq, bk, bv = layer.in_proj_bias.chunk(3)
    seen, other = layer.input_quantizer(x), layer.value_quantizer(value)
    q, k, v = seen @ wq.T + bq, seen @ wk.T + bk, other @ wv.T + bv
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        heads.append((q[..., i] @ k[..., i].transpose(1, 2) / 2).softmax(-1) @ v[..., i])
    joined = layer.out_proj.input_quantizer(torch.cat(heads, -1))
    want = joined @ layer.out_proj.computed().T + layer.out_proj.bias
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"is_causal": True}, "is_causal=True says what attn_mask is: give that, too"),
        ({"attn_mask": torch.zeros(3, 4)}, r"attn_mask is \(3, 4\), expected \(3, 3\) or \(4, 3, 3\)"),
        ({"attn_mask": torch.zeros(1, 3, 3)}, r"attn_mask is \(1, 3, 3\), expected"),
        ({"key_padding_mask": torch.zeros(1, 3)}, r"key_padding_mask is \(1, 3\), expected \(2, 3\)"),
    ],
)
def test_masks_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    x = torch.randn(3, 2, 8)
    with pytest.raises(ConfigError, match=message):
        MultiheadAttentionQAT(8, 2)(x, x, x, **arguments)
