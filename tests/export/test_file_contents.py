# SPDX-License-Identifier: Apache-2.0
"""What a file says besides numbers, and what the report on it advises."""

import re
from pathlib import Path

import torch
from torch import nn

import fxslim
from fxslim.export import OnnxVerification, export_onnx
from fxslim.nn import WeightQuant


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_file_does_not_say_where_its_source_lies(tmp_path) -> None:
    x = torch.randn(4, 8)
    quantized = fxslim.prepare_qat(network(), example_inputs=x)
    quantized(x)
    for number, model in enumerate((network(), quantized)):
        path = tmp_path / f"{number}.onnx"
        export_onnx(model, x, path)
        content = path.read_bytes()
        for words in ("stack_trace", "pkg.", str(Path(__file__).parent), str(Path(torch.__file__).parent)):
            assert words.encode() not in content, words


def test_the_advice_against_saturation_exists_and_helps() -> None:
    seen = OnnxVerification(
        path="x.onnx", outputs=(), rounding=0.0, relative_one_by_one=0.0, relative_here=0.3, saturates=True
    )
    said = str(seen)
    config = eval(re.search(r"WeightQuant\(.*?\)", said).group(), {"WeightQuant": WeightQuant})
    assert 2 * 255 * max(map(abs, config.grid)) < 1 << 15
    assert 2 * 255 * max(map(abs, WeightQuant().grid)) >= 1 << 15
