# SPDX-License-Identifier: Apache-2.0
"""The rule by which layers stay dense, at its edges."""

import pytest
import torch
from torch import nn

import fxslim
from fxslim.deploy.sparse_speed import LEAST, why_dense

SHAPE = (LEAST[torch.float32].filters, LEAST[torch.float32].inputs, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_edges(dtype: torch.dtype) -> None:
    least = LEAST[dtype]
    shape = (least.filters, least.inputs, 3, 3)
    assert why_dense(shape, 1 - least.zero - 0.001, dtype) == ""
    assert why_dense(shape, 1 - least.zero + 0.02, dtype).endswith(
        f"of its blocks are zero, less than {least.zero:.0%}"
    )
    assert why_dense((least.filters - 1, least.inputs), 0.5, dtype).endswith(f"fewer than {least.filters}")
    assert why_dense((least.filters, least.inputs - 1), 0.5, dtype).endswith(f"fewer than {least.inputs}")


@pytest.mark.parametrize(
    ("dtype", "device", "fits"),
    [
        (torch.float32, "cpu", True), (torch.int8, "cpu", True), (torch.bfloat16, "cuda", True),
        (torch.float64, "cpu", False), (torch.bfloat16, "cpu", True), (torch.float32, "cuda", False),
        (torch.int8, "cuda", False), (torch.float32, "mps", False),
    ],
)  # fmt: skip
def test_types_that_kernels_take(dtype: torch.dtype, device: str, fits: bool) -> None:
    assert why_dense(SHAPE, 0.5, dtype, device) == ("" if fits else f"no block-sparse kernel for {dtype} on {device}")


def test_models_in_other_types_stay_dense() -> None:
    model = fxslim.sparsify(nn.Sequential(nn.Linear(128, 64).double()), "cin32cout64", ratio=0.5)
    plan = fxslim.plan_convert(model)
    assert plan.layers[0].kernel == "dense: no block-sparse kernel for torch.float64 on cpu"
    assert type(plan.apply(model)[0]) is nn.Linear
