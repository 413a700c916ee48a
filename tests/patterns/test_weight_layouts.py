# SPDX-License-Identifier: Apache-2.0
"""Transposed and grouped convolutions: patterns run over the inputs of each output, wherever the weight has them."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxslim.nn import MaskedConv2d, MaskedConvTranspose2d
from fxslim.patterns.weight_layout import layout_of

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def transposed_layers(draw: st.DrawFn) -> nn.Module:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 5)) for _ in range(2))
    return TRANSPOSED[dims](inputs, outputs, draw(st.integers(1, 3)), groups=groups)


@given(layer=transposed_layers())
def test_rows_are_the_inputs_that_an_output_reads(layer: nn.Module) -> None:
    """Entry [o, j] of the rows is the weight from the j-th input of o's group to o."""
    layout, weight = layout_of(layer), layer.weight.detach()
    rows = layout.rows(weight)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    assert rows.shape == (layer.out_channels, inputs, *layer.kernel_size)
    for o in range(layer.out_channels):
        group, within = divmod(o, outputs)
        for j in range(inputs):
            assert torch.equal(rows[o, j], weight[group * inputs + j, within])
    assert torch.equal(layout.restored(rows), weight)


def test_the_rows_of_plain_layers_are_their_weights() -> None:
    for layer in (nn.Conv2d(4, 8, 3, groups=2), nn.Linear(4, 8)):
        assert layout_of(layer).rows(layer.weight) is layer.weight


def test_which_inputs_count_is_seen_in_the_outputs() -> None:
    """At most 2 of every 4 inputs of a group change an output."""
    for kind in (MaskedConv2d, MaskedConvTranspose2d):
        layer = kind(16, 6, 1, groups=2, bias=False, pattern="2:4")
        with torch.no_grad():
            reach = layer(torch.eye(16)[:, :, None, None]).flatten(1) != 0
        for o in range(6):
            first = 8 * (o // 3)
            assert reach[first : first + 4, o].sum() == reach[first + 4 : first + 8, o].sum() == 2
            assert reach[:, o].sum() == 4
