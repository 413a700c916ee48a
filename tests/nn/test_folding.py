# SPDX-License-Identifier: Apache-2.0
"""Batch norms folded into masked convolutions by torch's own function: pattern and values stay."""

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from fxslim.nn import MaskedLinear
from fxslim.patterns import Block, Unstructured, check
from tests.nn.masked_layers import KINDS

NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def trained(norm: nn.Module) -> nn.Module:
    for state in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(state, 0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
@pytest.mark.parametrize("pattern", ["2:4", Block(cin=4, cout=3, ratio=0.5), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("update_freq", [None, 1])
def test_convolutions(kind: str, pattern, update_freq) -> None:
    cls, arguments, shape = KINDS[kind]
    layer = cls(*arguments, pattern=pattern, update_freq=update_freq).eval()
    norm, x = trained(NORMS[len(shape)](6)), torch.randn(shape)
    fused = fuse_conv_bn_eval(layer, norm, transpose="transposed" in kind)
    torch.testing.assert_close(fused(x), norm(layer(x)))
    assert torch.equal(fused.weight_mask, layer.weight_mask)
    assert check(fused, layer.mask_settings.pattern).ok
    assert torch.equal(fused.masked() != 0, layer.masked() != 0)
    assert check(fused.to_float(), layer.mask_settings.pattern).ok


def test_linear_layers() -> None:
    layer, norm, x = MaskedLinear(8, 6, pattern="2:4").eval(), trained(nn.BatchNorm1d(6)), torch.randn(3, 8)
    fused = fuse_linear_bn_eval(layer, norm)
    torch.testing.assert_close(fused(x), norm(layer(x)))
    assert check(fused, "2:4").ok
    assert check(fused, "2:4").sparsity == 0.5
