# SPDX-License-Identifier: Apache-2.0
"""A counterpart that quantizes nothing is the plain layer, and one that does is it on the quantized weight."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim.nn import EmbeddingQAT, QuantizedLayer
from tests.nn.quantized.quantized_layers import KINDS, NOTHING, plain_layers, seeds, weights_only

Case = tuple[nn.Module, type[QuantizedLayer], Tensor, dict[str, Any]]


def outputs_and_gradients(layer: Any, x: Tensor, arguments: dict[str, Any]) -> list[Tensor | None]:
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf, **arguments)
    torch.manual_seed(0)
    y.backward(torch.randn_like(y))
    bias = None if layer.bias is None else layer.bias.grad.clone()
    return [y, leaf.grad, layer.weight.grad.clone(), bias]


def check_equal(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@given(case=plain_layers())
def test_with_nothing_quantized(case: Case) -> None:
    plain, cls, x, arguments = case
    want = outputs_and_gradients(plain, x, arguments)
    check_equal(outputs_and_gradients(cls.from_float(plain, config=NOTHING), x, arguments), want)


@given(case=plain_layers(), granularity=st.sampled_from(["tensor", "channel", "group"]), bits=st.integers(2, 16))
def test_with_a_quantized_weight(case: Case, granularity: str, bits: int) -> None:
    """ARQ's gradient passes whole, so that it is that of a plain layer which holds the quantized weight."""
    plain, cls, x, arguments = case
    size = {"group_size": 2} if granularity == "group" else {}
    layer: Any = cls.from_float(plain, config=weights_only(bits=bits, granularity=granularity, **size))
    got = outputs_and_gradients(layer, x, arguments)
    quantized = layer.computed().detach().clone()
    with torch.no_grad():
        plain.weight.copy_(quantized)
    check_equal(got, outputs_and_gradients(plain, x, arguments))


@given(
    seed=seeds, bias=st.booleans(), padding_idx=st.sampled_from([None, 0, -1]), by_frequency=st.booleans(),
    shape=st.lists(st.integers(0, 4), max_size=3), bits=st.sampled_from([None, 4, 8]),
)  # fmt: skip
def test_embeddings(seed: int, bias: bool, padding_idx, by_frequency: bool, shape: list[int], bits) -> None:
    torch.manual_seed(seed)
    plain = nn.Embedding(7, 4, padding_idx=padding_idx, scale_grad_by_freq=by_frequency, dtype=torch.float64)
    layer: Any = EmbeddingQAT.from_float(plain, config=NOTHING if bits is None else weights_only(bits=bits))
    x = torch.randint(0, 7, shape)
    got = layer(x)
    direction = torch.randn_like(got)
    got.backward(direction)
    gradient, plain.weight.grad = plain.weight.grad, None
    if bits is not None:
        scale = plain.weight.detach().abs().amax(1, keepdim=True).numpy()
        assert (layer.computed().detach() - plain.weight.detach()).abs().amax() <= scale.max() / 2 ** (bits - 1)
        with torch.no_grad():
            plain.weight.copy_(layer.computed())
    want = plain(x)
    want.backward(direction)
    assert torch.equal(got, want)
    assert torch.equal(gradient, plain.weight.grad)
    if padding_idx is not None:
        assert not gradient[padding_idx].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(kind: str, dtype: torch.dtype, device) -> None:
    cls, arguments, shape = KINDS[kind]
    layer: Any = cls(*arguments, config="int8", device=device, dtype=dtype)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    for _ in range(3):
        y = layer(x)
        assert y.dtype == dtype
        y.float().pow(2).mean().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == dtype
    plain = layer.to_float()(x)
    assert not torch.equal(y, plain)
    torch.testing.assert_close(y.float(), plain.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, device) -> None:
    cls, arguments, shape = KINDS[kind]
    layer: Any = cls(*arguments, config="int8", device=device)
    x = torch.randn(shape, device=device)
    layer(x)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.input_quantizer.clip_max.grad.isfinite().all()
