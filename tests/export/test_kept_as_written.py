# SPDX-License-Identifier: Apache-2.0
"""Layers that are left in float stay so in the file as ONNX Runtime optimizes it, between quantized ones."""

from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.export import export_onnx
from fxslim.export.passes import settle
from fxslim.nn import QuantConfig, WeightQuant

IMAGE, LINEAR = partial(nn.Conv2d, 3, 8, 3), partial(nn.Linear, 8, 8)
NETWORKS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "convolution": (IMAGE, partial(nn.Conv2d, 8, 8, 3), (4, 3, 10, 10)),
    "convolution without bias": (IMAGE, partial(nn.Conv2d, 8, 8, 3, bias=False), (4, 3, 10, 10)),
    "one-dimensional": (partial(nn.Conv1d, 3, 8, 3), partial(nn.Conv1d, 8, 8, 3), (4, 3, 12)),
    "transposed": (IMAGE, partial(nn.ConvTranspose2d, 8, 8, 2), (4, 3, 8, 8)),
    "linear": (LINEAR, LINEAR, (32, 8)),
    "linear without bias": (LINEAR, partial(nn.Linear, 8, 8, bias=False), (32, 8)),
    "tokens": (LINEAR, LINEAR, (4, 5, 8)),
    "tokens without bias": (LINEAR, partial(nn.Linear, 8, 8, bias=False), (4, 5, 8)),
}


def network(name: str, behind: Any) -> tuple[nn.Module, Tensor]:
    """The middle layer has outputs of very different sizes: one scale for all of them would show."""
    torch.manual_seed(0)
    first, middle, shape = NETWORKS[name]
    last = nn.Conv2d(8, 8, 1) if len(shape) == 4 else nn.Conv1d(8, 8, 1) if "one" in name else nn.Linear(8, 8)
    model = nn.Sequential(first(), nn.ReLU(), middle(), behind(), last)
    with torch.no_grad():
        model[2].weight.mul_(torch.rand_like(model[2].weight) ** 4)
    return model.eval(), torch.randn(shape)


@pytest.mark.parametrize("behind", [nn.ReLU, nn.Identity, nn.Hardtanh])
@pytest.mark.parametrize("wide", [False, True], ids=["skipped", "16 bits"])
@pytest.mark.parametrize("name", NETWORKS)
def test_they_are_not_quantized_by_the_runtime(name: str, wide: bool, behind: Any, tmp_path: Path) -> None:
    model, x = network(name, behind)
    wishes = {"overrides": {"2": QuantConfig(weight=WeightQuant(bits=16))}} if wide else {"skip": ["2"]}
    fxslim.quantize(model, "int8", data=[x], example_inputs=x, **wishes)
    found = export_onnx(model, x, tmp_path / "m.onnx")
    assert found is not None
    assert max(found.relative, found.relative_one_by_one) <= 1e-6
    # What is settled stays as it is.
    written = ir.load(tmp_path / "m.onnx")
    before = [node.op_type for node in written.graph]
    assert before.count("Max") == 1
    assert [node.op_type for node in settle(written).graph] == before


def test_quantized_layers_need_no_help(tmp_path: Path) -> None:
    for name in NETWORKS:
        model, x = network(name, nn.ReLU)
        fxslim.quantize(model, "int8", data=[x], example_inputs=x)
        export_onnx(model, x, tmp_path / "m.onnx")
        assert "Max" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}, name
