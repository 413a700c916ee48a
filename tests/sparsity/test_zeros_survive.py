# SPDX-License-Identifier: Apache-2.0
"""Zeros stay exactly 0 on the way out: quantized on a symmetric grid, baked, exported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxslim
from fxslim import kernels
from fxslim.patterns import check
from fxslim.sparsity import bake
from tests.sparsity.small_networks import batches, small_net


@given(st.integers(0, 2**20), st.sampled_from([2, 4, 8, 16]), st.sampled_from([None, 0]))
@settings(max_examples=30, deadline=None)
def test_symmetric_quantization_keeps_zeros(seed: int, bits: int, axis: int | None) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(8, 16) * 10 ** torch.randn(8, 1)
    mask = kernels.nm_mask(weight, 2, 4)
    nothing = torch.full((1 if axis is None else 8,), torch.inf)
    quantized, *_ = kernels.observe_fake_quantize(
        torch.where(mask, weight, 0), nothing, -nothing, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1,
        averaging=1.0, symmetric=True, axis=axis,
    )  # fmt: skip
    assert not quantized[~mask].any()
    assert check(quantized, "2:4").ok


@pytest.mark.parametrize("pattern", ["2:4", "cin8cout16", "unstructured"])
def test_exported_programs_compute_what_the_baked_model_does(pattern: str) -> None:
    """The exporter reads masked layers as they are, and a baked model has nothing but zeros in plain weights."""
    x = batches()[0][0]
    model = fxslim.sparsify(small_net(), pattern, ineligible="ignore")
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    plan = fxslim.applied(model)[0]
    bake(model)
    torch.testing.assert_close(exported(x), model(x))
    program = torch.export.export(model, (x,))
    assert not any("mask" in name for name in program.state_dict)
    for one in plan.weights:
        assert check(program.state_dict[one.name], one.settings.pattern).ok
