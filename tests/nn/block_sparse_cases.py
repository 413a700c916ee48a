# SPDX-License-Identifier: Apache-2.0
"""Layers with zero blocks of any size, and inputs for them."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim.nn import MaskedConv2d, MaskedLinear
from fxslim.patterns import Block

RATIOS = [0.0, 0.3, 0.5, 0.75, 0.95]


@st.composite
def patterns(draw: st.DrawFn) -> Block:
    """Blocks of odd sizes too."""
    size = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 32, 64])
    return Block(cin=draw(size), cout=draw(size), per_position=draw(st.booleans()), ratio=draw(st.sampled_from(RATIOS)))


@st.composite
def convolutions(draw: st.DrawFn, modes: tuple[str, ...] = ("zeros",)) -> tuple[nn.Conv2d, Tensor, Block]:
    """Any kernel, stride, padding and dilation, with channels that fill no block, and an input in any layout."""
    kernel, dilation = ([draw(st.integers(1, 3)) for _ in range(2)] for _ in range(2))
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    padding: Any = draw(st.sampled_from(["same", "valid", 0, 1, (2, 0), (1, 3)]))
    inputs, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    layer = nn.Conv2d(
        inputs, outputs, tuple(kernel), (1, 1) if padding == "same" else tuple(stride), padding, tuple(dilation),
        bias=draw(st.booleans()), padding_mode=draw(st.sampled_from(modes)),
    )  # fmt: skip
    x = torch.randn(draw(st.integers(0, 3)), inputs, draw(st.integers(7, 12)), draw(st.integers(7, 12)))
    return layer, x.to(memory_format=torch.channels_last) if draw(st.booleans()) else x, draw(patterns())


def masked(layer: nn.Module, pattern: Block) -> Any:
    """With a mask of this pattern; all zero blocks there are where it would remove none."""
    kind: Any = MaskedConv2d if isinstance(layer, nn.Conv2d) else MaskedLinear
    try:
        return kind.from_float(layer, pattern=pattern)
    except ValueError:
        return kind.from_float(layer, pattern=pattern.gentler(0.0))


def assert_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= relative * expected.norm() + 1e-6
