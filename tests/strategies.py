# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies that several tests share."""

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@st.composite
def shapes(draw: st.DrawFn, min_dims: int = 0, max_dims: int = 5, max_side: int = 9) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, max_side), min_size=min_dims, max_size=max_dims)))


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and x.dim() >= 1:
        wide = torch.stack([x, torch.full_like(x, 7)], dim=-1)
        return wide[..., 0]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    return x


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "offset"]


@st.composite
def tensors(draw: st.DrawFn, min_dims: int = 0, max_dims: int = 5, max_side: int = 9, special: bool = True) -> Tensor:
    """Random floating tensors of any dtype and layout; some with NaN, infinities, ties, huge and tiny values."""
    shape = draw(shapes(min_dims, max_dims, max_side))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1e-3, 1.0, 40.0]))
    if draw(st.booleans()):
        x = (x * 2).round() / 4
    if special and x.numel() > 0 and draw(st.booleans()):
        odd = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6e4, 1e-7]))
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = odd
    return lay_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int]:
    """(quant_min, quant_max) of 2 to 16 bits: signed, narrow, unsigned."""
    bits = draw(st.integers(2, 16))
    kind = draw(st.sampled_from(["signed", "narrow", "unsigned"]))
    if kind == "unsigned":
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + (kind == "narrow"), 2 ** (bits - 1) - 1
