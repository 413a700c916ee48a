# SPDX-License-Identifier: Apache-2.0
"""export_onnx takes a file that only the rounding of its int32 biases sets apart, and none with other biases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import ExportError
from fxslim.export import export_onnx, verify_onnx
from fxslim.export.passes import graph_edits, integer_biases

# Below what int32 biases do, and three times what float32 turns over is, too.
TOLERANCE = 2e-4


def steep() -> tuple[nn.Module, torch.Tensor]:
    """One product a sum, weights of 4 bits: a step of a bias is a tenth of an output step, so many outputs turn over.

    Without example inputs only the export learns of the norm, which it makes part of the bias.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 1, 1, 1, generator=generator) * 2 - 1
    norm = nn.BatchNorm2d(64)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(1, 64, 1, bias=False), norm, nn.Conv2d(64, 64, 1, groups=64), nn.Flatten()
    )
    for values in (model[0].weight, model[2].weight, norm.bias):
        nn.init.uniform_(values, -1, 1, generator)
    return fxslim.quantize(model.eval(), "w4a8", data=[x], forward=lambda net, batch: net(batch)), x


def test_rounded_biases_are_no_disagreement(tmp_path: Path) -> None:
    model, x = steep()
    found = export_onnx(model, x, tmp_path / "m.onnx", tolerance=TOLERANCE)
    assert found is not None
    assert found.relative_one_by_one > max(TOLERANCE, 3 * found.rounding)
    assert found.with_float_biases is not None
    assert found.with_float_biases <= max(TOLERANCE, 3 * found.rounding)
    assert "without the rounding of biases" in str(found)
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
    assert verify_onnx(model, tmp_path / "m.onnx", x).relative == found.relative


def test_other_biases_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = graph_edits.GraphEdit.constant

    def shifted(edit: Any, array: Any, stem: str) -> Any:
        return constant(edit, array + 1 if stem.endswith("bias_q") else array, stem)

    monkeypatch.setattr(integer_biases.GraphEdit, "constant", shifted)
    model, x = steep()
    with pytest.raises(ExportError, match="differs from the model") as caught:
        export_onnx(model, x, tmp_path / "m.onnx", tolerance=TOLERANCE)
    assert "without the rounding" not in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["m.disagrees.onnx"]
