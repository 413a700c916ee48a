# SPDX-License-Identifier: Apache-2.0
"""MaskedMultiheadAttention beside nn.MultiheadAttention with zeros in its weights."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim import UnsupportedLayerError
from fxslim.nn import MaskedLinear, MaskedMultiheadAttention
from tests.nn.masked_layers import gradients, plain_twin, seeds


def twin_of(layer: MaskedMultiheadAttention) -> nn.MultiheadAttention:
    twin = plain_twin(layer)
    if isinstance(layer.out_proj, MaskedLinear):
        twin.out_proj = plain_twin(layer.out_proj)
        twin.out_proj.__class__ = nn.modules.linear.NonDynamicallyQuantizableLinear
    return twin


@st.composite
def attentions(draw: st.DrawFn) -> tuple[nn.Module, dict[str, Any]]:
    """A layer with any of its arguments, and those of its forward."""
    torch.manual_seed(draw(seeds))
    width, (queries, keys) = 8, (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    kdim, vdim = (draw(st.sampled_from([None, 6])) for _ in range(2))
    batch_first, batch = draw(st.booleans()), draw(st.sampled_from([None, 3]))
    plain = nn.MultiheadAttention(
        width, 2, dropout=draw(st.sampled_from([0.0, 0.5])), bias=draw(st.booleans()), batch_first=batch_first,
        add_bias_kv=draw(st.booleans()), add_zero_attn=draw(st.booleans()), kdim=kdim, vdim=vdim, dtype=torch.float64,
    )  # fmt: skip
    layer: Any = fxslim.sparsify(nn.Sequential(plain), "2:4", gradient=draw(gradients))[0]
    if not draw(st.booleans()):
        layer = MaskedMultiheadAttention.from_float(layer.to_float(), pattern="1:4")

    def sequence(length: int, features: int) -> Tensor:
        sides = (
            [length, features]
            if batch is None
            else [batch, length, features]
            if batch_first
            else [length, batch, features]
        )
        return torch.randn(sides, dtype=torch.float64)

    arguments: dict[str, Any] = {"query": sequence(queries, width)}
    if kdim is None and vdim is None and draw(st.booleans()):
        keys, arguments["key"] = queries, arguments["query"]
        arguments["value"] = arguments["key"]
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
    return layer.train(draw(st.booleans())), arguments


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@given(case=attentions())
def test_same_as_plain(case: tuple[Any, dict[str, Any]]) -> None:
    layer, arguments = case
    twin = twin_of(layer)
    leaf = arguments["query"].requires_grad_()
    results = []
    for module in (layer, twin):
        torch.manual_seed(0)
        leaf.grad = None
        output, attention = module(**arguments)
        output.sum().backward()
        results.append((output, attention, leaf.grad))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12, equal_nan=True)
    for owner, other in ((layer, twin), (layer.out_proj, twin.out_proj)):
        for name, parameter in other.named_parameters(recurse=False):
            mask = getattr(owner, name + "_mask", None)
            want = parameter.grad
            if mask is not None and owner.mask_settings.gradient == "zero":
                want = want.masked_fill(~mask, 0)
            elif mask is not None:
                want = want + owner.mask_settings.decay * (~mask * getattr(owner, name).detach())
            torch.testing.assert_close(getattr(owner, name).grad, want, rtol=0, atol=1e-12, equal_nan=True)


def test_masks_of_the_output_projection_are_made_anew_with_those_of_the_input() -> None:
    layer = fxslim.sparsify(nn.Sequential(nn.MultiheadAttention(8, 2)), "2:4", update_freq=2)[0]
    x = torch.randn(3, 1, 8)
    for batch in range(5):
        with torch.no_grad():
            layer.in_proj_weight.copy_(torch.randn(24, 8))
            layer.out_proj.weight.copy_(torch.randn(8, 8))
        before = layer.in_proj_weight_mask.clone(), layer.out_proj.weight_mask.clone()
        layer(x, x, x)
        changed = [
            not torch.equal(old, new)
            for old, new in zip(before, (layer.in_proj_weight_mask, layer.out_proj.weight_mask), strict=True)
        ]
        assert changed == [batch % 2 == 0] * 2
    assert int(layer.num_mask_batches) == int(layer.out_proj.num_mask_batches) == 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    layer = MaskedMultiheadAttention(8, 2, batch_first=True, pattern="2:4").eval()
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedLayerError, match="takes no nested tensors: pad them"),
    ):
        layer(x, x, x)
