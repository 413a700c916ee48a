# SPDX-License-Identifier: Apache-2.0
"""Models, names and inputs as users have them: files agree, or errors say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxslim.errors import ConfigError, ExportError
from fxslim.export import export_onnx, verify_onnx

X = torch.randn(4, 6)


class Layer(nn.Module):
    """A linear layer, and outputs of all kinds that are made of its result."""

    def __init__(self, outputs: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.outputs = nn.Linear(6, 3), outputs

    def forward(self, x: Tensor) -> Any:
        return self.outputs(self.layer(x), x)


def test_outputs_of_other_types(tmp_path: Path) -> None:
    model = Layer(lambda y, x: {"best": y.argmax(1), "positive": y > 0, "flat": y.view(-1)})
    found = export_onnx(model, X, tmp_path / "m.onnx")
    assert found is not None
    assert len(found.outputs) == 3
    assert found.relative < 1e-5
    assert found.argmax == 1


def test_equal_infinities_agree(tmp_path: Path) -> None:
    model = Layer(lambda y, x: y.masked_fill(x[:, :3] > 0, float("-inf")))
    found = export_onnx(model, X, tmp_path / "m.onnx")
    assert found is not None
    assert found.relative < 1e-5
    assert found.outputs[0].largest < 1e-5


@pytest.mark.parametrize("first", [False, True])
def test_nan_on_one_side_is_a_difference(tmp_path: Path, first: bool) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(Layer(lambda y, x: (y, x * 1)), X, path)
    broken = Layer(lambda y, x: (y / 0 * 0, x * 1) if first else (y, x / 0 * 0))
    found = verify_onnx(broken, path, X)
    assert found.relative == float("inf")
    assert "NaN or infinity on one side only" in str(found)


@pytest.mark.parametrize("dtype, kind", [(torch.float64, "dtype"), (torch.float16, "dtype"), (torch.bfloat16, "NumPy")])
def test_inputs_of_another_type(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    model, path = Layer(lambda y, x: y), tmp_path / "m.onnx"
    export_onnx(model, X, path)
    with pytest.raises(ConfigError, match=rf"input x is tensor\(float\), got {dtype}: .*{kind}"):
        verify_onnx(model, path, X.to(dtype))


@pytest.mark.parametrize(
    "wishes, message",
    [
        ({"input_names": ["a", "b"]}, r"input_names has 2 names \(a, b\), the model 1 inputs: give one for each"),
        ({"output_names": ["a", "b"]}, r"output_names has 2 names \(a, b\), the model 1 outputs"),
        ({"input_names": "image"}, r"input_names='image' is one string: give a list of names, \['image'\]"),
        ({"input_names": ["x"], "output_names": ["x"]}, "'x' is twice among input_names and output_names"),
        ({"tolerance": float("nan")}, "tolerance=nan is no relative error"),
        ({"target": "onnxruntme"}, "unknown target 'onnxruntme'.*did you mean 'onnxruntime'"),
    ],
)
def test_wrong_names_and_tolerances(tmp_path: Path, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(Layer(lambda y, x: y), X, tmp_path / "m.onnx", **wishes)
    assert not [*tmp_path.iterdir()]


def test_nothing_to_compare_and_names_too_long(tmp_path: Path) -> None:
    model = Layer(lambda y, x: y)
    with pytest.raises(ConfigError, match="holds no value: nothing could be compared"):
        export_onnx(model, X[:0], tmp_path / "m.onnx")
    with pytest.raises(
        ExportError, match=r"can't be written: OSError: .*too long.*; give a file in a folder that exists"
    ):
        export_onnx(model, X, tmp_path / ("m" * 300))
    with pytest.raises(ExportError, match=r"float32 and float16: of a model in another type, export model\.float\(\)"):
        export_onnx(nn.Conv1d(2, 2, 1).double(), torch.randn(1, 2, 4).double(), tmp_path / "m.onnx")
    assert not [*tmp_path.iterdir()]
