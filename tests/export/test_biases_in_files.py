# SPDX-License-Identifier: Apache-2.0
"""A file's int32 biases are those that the model adds in eval mode: only the order of float sums sets them apart."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import ExportError
from fxslim.export import export_onnx, verify_onnx
from fxslim.export.model_copies import deployed_copy
from fxslim.export.passes import integer_biases
from fxslim.graph.inputs import as_inputs
from fxslim.nn import QuantConfig, WeightQuant

# Rounding of float32; half a step of a bias is some hundred times as much in networks of so few products.
TOLERANCE = 1e-6


class Residual(nn.Module):
    def __init__(self, channels: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, 1, 1, 1, groups, bias), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)) + x)


def network(seed: int) -> tuple[nn.Module, Tensor]:
    """Random, with factors of both signs, depthwise layers, and biases that are many steps."""
    generator = torch.Generator().manual_seed(seed)
    channels = int(torch.randint(1, 3, (), generator=generator)) * 4
    groups = (1, 2, channels)[seed % 3]
    model = nn.Sequential(
        nn.Conv2d(3, channels, 1, bias=seed % 2 == 0), nn.BatchNorm2d(channels), nn.ReLU(),
        Residual(channels, groups, seed % 2 == 1), nn.Conv2d(channels, channels, 1), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(values, generator=generator)
            nn.init.uniform_(module.running_var, 0.2, 3, generator)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, generator=generator)
    return model.eval(), torch.randn(32, 3, 6, 6, generator=generator)


def biases(path: Path) -> list[np.ndarray]:
    return [onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer if one.data_type == 6]


@pytest.mark.parametrize("config", ["int8", "w4a8", QuantConfig(weight=WeightQuant(granularity="tensor"))])
@pytest.mark.parametrize("seed", range(6))
def test_file_and_model_agree(seed: int, config: Any, tmp_path: Path) -> None:
    model, x = network(seed)
    fxslim.quantize(model, config, data=[x], example_inputs=x, fold_batch_norms=seed % 2 == 0)
    found = export_onnx(model, x, tmp_path / "m.onnx")
    assert found is not None
    assert found.relative <= TOLERANCE
    assert len([one for one in biases(tmp_path / "m.onnx") if one.any()]) >= 4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_plain_exporters_file_agrees_too(seed: int, tmp_path: Path) -> None:
    model, x = network(seed)
    fxslim.quantize(model, "int8", data=[x], example_inputs=x)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    assert verify_onnx(model, tmp_path / "m.onnx", x).relative <= TOLERANCE


def with_dead_filters(model: nn.Module, size: float) -> nn.Module:
    """Some filters are next to nothing, and have biases that int32 does not hold in steps of their sums."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
                rows = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
                rows[::3].mul_(size)
                if layer.bias is not None:
                    layer.bias[::3].add_(layer.bias[::3].sign() * 0.5)
    return model


def _decoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Linear(49, 5),
    )  # fmt: skip


@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-40])
@pytest.mark.parametrize("config", ["int8", "w4a8", QuantConfig(weight=WeightQuant(granularity="tensor"))])
@pytest.mark.parametrize("name", ["network 0", "network 1", "network 2", "decoder"])
def test_filters_that_have_died(name: str, config: Any, size: float, tmp_path: Path) -> None:
    """As the runtime optimizes the file: it stores biases as int32 itself, where a file does not."""
    torch.manual_seed(0)
    model, x = (_decoder(), torch.randn(8, 3, 3, 3)) if name == "decoder" else network(int(name[-1]))
    with_dead_filters(model, size).eval()
    fxslim.quantize(model, config, data=[x], example_inputs=x)
    found = export_onnx(model, x, tmp_path / "m.onnx")
    assert found is not None
    assert max(found.relative, found.relative_one_by_one) <= TOLERANCE
    torch.onnx.export(model, (x,), str(tmp_path / "plain.onnx"), dynamo=True, verbose=False)
    plain = verify_onnx(model, tmp_path / "plain.onnx", x)
    assert max(plain.relative, plain.relative_one_by_one) <= TOLERANCE


def test_attention_with_a_dead_projection(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        model.self_attn.in_proj_weight[3].mul_(1e-9)
        model.self_attn.in_proj_bias[3] = 0.7
    x = torch.randn(4, 5, 8)
    fxslim.quantize(with_dead_filters(model, 1e-9), data=[x], example_inputs=x)
    found = export_onnx(model, x, tmp_path / "m.onnx")
    assert found is not None
    assert max(found.relative, found.relative_one_by_one) <= TOLERANCE


def test_a_file_that_the_runtime_optimizes_into_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_biases, "_coarser", lambda bias, grid, integers, scale, *others: (integers, scale))
    model, x = network(0)
    fxslim.quantize(with_dead_filters(model, 1e-9), data=[x], example_inputs=x)
    with pytest.raises(ExportError, match=r"differs from the model by \d") as told:
        export_onnx(model, x, tmp_path / "m.onnx")
    seen = re.search(r"relative L2 (\S+),", str(told.value))
    assert seen is not None
    assert float(seen.group(1)) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_converted_models_agree(seed: int) -> None:
    model, x = network(seed)
    fxslim.quantize(model, "int8", data=[x], example_inputs=x)
    wanted = model(x).detach()
    fxslim.convert(model, example_inputs=x)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_the_copy_for_the_file_rounds_once() -> None:
    model, x = network(0)
    fxslim.quantize(model, "int8", data=[x], example_inputs=x)
    copy = deployed_copy(model, as_inputs(x)[0])
    with torch.no_grad():
        torch.testing.assert_close(copy(x), model(x), rtol=1e-5, atol=1e-5)
    for layer in copy.modules():
        if isinstance(layer, fxslim.nn.QuantizedLayer):
            assert layer.terms()[1] is layer.bias


def test_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    nn.init.normal_(model.self_attn.in_proj_bias)
    x = torch.randn(4, 6, 8)
    fxslim.quantize(model, "int8", data=[x], example_inputs=x)
    found = export_onnx(model, x, tmp_path / "m.onnx")
    assert found is not None
    assert found.relative <= TOLERANCE
