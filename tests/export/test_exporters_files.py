# SPDX-License-Identifier: Apache-2.0
"""QDQ files that torch's exporter and onnxruntime's quantizer write are split, too: the networks of AMCT's sample."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from fxslim.errors import ExportError
from fxslim.export import convert_qat_model
from fxslim.export.qdq_files import load_qdq
from tests.export.qdq_models import run
from tests.export.simulated_ascend import simulate


class Batches(CalibrationDataReader):
    def __init__(self, batches: list[np.ndarray]) -> None:
        self.left = [{"x": batch} for batch in batches]

    def get_next(self):
        return self.left.pop(0) if self.left else None


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2, 2),
        nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2, 2), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up, self.tokens = nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), nn.Linear(56, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.tokens(self.up((x + self.second(x)).relu()))


def exported(
    model: nn.Module, path: Path, per_channel: bool, activations: QuantType, kinds=("Conv", "Gemm", "Add")
) -> Path:
    x = torch.randn(2, 1, 28, 28)
    plain = path.with_name("float.onnx")
    torch.onnx.export(model.eval(), (x,), plain, dynamo=True, input_names=["x"], verbose=False, external_data=False)
    batches = [np.random.default_rng(i).normal(size=x.shape).astype(np.float32) for i in range(4)]
    quantize_static(
        plain, path, Batches(batches), QuantFormat.QDQ, list(kinds), per_channel=per_channel,
        activation_type=activations, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("activations", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("model, per_channel", [(lenet, False), (Residual, True)])
def test_split(model, per_channel, activations, tmp_path) -> None:
    kinds = ("Conv", "Gemm", "Add") if model is lenet else ("Conv", "ConvTranspose", "Add")
    path = exported(model(), tmp_path / "inter_model.onnx", per_channel, activations, kinds)
    fake, deploy = convert_qat_model(path, tmp_path / "outputs" / "lenet")
    x = np.random.default_rng(9).normal(size=(2, 1, 28, 28)).astype(np.float32)
    expected, found = run(path, x=x), run(fake, x=x)
    # The output is on a grid itself: rounding may take it to the neighbouring step, no further.
    step = float(list(load_qdq(path).quantizers.values())[-1].scale)
    simulated = run(simulate(onnx.load(deploy)), x=x)
    assert np.abs(expected).max() > 20 * step
    assert np.abs(found - expected).max() <= 1.001 * step
    assert np.abs(simulated - found).max() <= 1.001 * step
    counts = [node.op_type for node in onnx.load(deploy).graph.node]
    assert counts.count("AscendDequant") == (5 if model is lenet else 3)


def test_scales_per_channel_of_a_linear_layer_are_refused(tmp_path) -> None:
    path = exported(lenet(), tmp_path / "inter_model.onnx", True, QuantType.QInt8)
    with pytest.raises(ExportError, match=r"Gemm '.*': its weight has 120 scales; Gemm is converted with one scale"):
        convert_qat_model(path, tmp_path / "lenet")
