# SPDX-License-Identifier: Apache-2.0
"""export_onnx: files that ONNX Runtime runs in integers, that agree with the model, or that are not there at all."""

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import CalibrationError, ConfigError, ExportError
from fxslim.export import export_onnx, onnx_export, verify_onnx
from tests.export.onnx_runs import operators, run, session

X = torch.randn(4, 3, 16, 16)


class Block(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels // stride, channels, 3, stride, 1, bias=False)
        self.norm1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.short = nn.Sequential(
            nn.Conv2d(channels // stride, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.last(y + self.short(x))


class Net(nn.Module):
    """Residual blocks, a pool, a join, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(Block(16, 2), Block(16, 1))
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.joined = nn.Conv2d(16, 16, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.joined(torch.cat([self.left(x).relu(), self.right(x).relu()], 1))
        return self.head(self.pool(x).flatten(1))


def settled(model: nn.Module) -> nn.Module:
    """Statistics of the norms from data, factors of both signs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            with torch.no_grad():
                module.weight[0] *= -1
            nn.init.normal_(module.bias, 0, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 16, 16))
    return model.eval()


def quantized(target: str = "onnxruntime", **wishes: Any) -> nn.Module:
    return fxslim.quantize(settled(Net()), "int8", data=[X], example_inputs=X, target=target, **wishes)


@pytest.mark.parametrize("fold", [False, True])
def test_all_in_integers(tmp_path: Path, fold: bool) -> None:
    model = quantized(fold_batch_norms=fold)
    state = copy.deepcopy(model.state_dict())
    path = tmp_path / "net.onnx"
    found = export_onnx(model, [X, torch.randn(4, 3, 16, 16)], path)
    assert found is not None
    assert found.relative <= max(0.01, 3 * found.rounding)
    assert found.outputs[0].steps is not None
    assert found.outputs[0].steps < 4
    assert str(path) in str(found)
    assert [one.name for one in tmp_path.iterdir()] == ["net.onnx"]
    one = session(str(path), plain=False)
    optimized = tmp_path / "optimized.onnx"
    options = type(one.get_session_options())()
    options.optimized_model_filepath = str(optimized)
    type(one)(str(path), options, providers=["CPUExecutionProvider"])
    counts = operators(str(optimized))
    assert not {"Conv", "Gemm", "MatMul", "Add", "BatchNormalization", "Relu", "Concat"} & counts.keys(), counts
    assert counts["QLinearConv"] == 10
    assert (counts["QLinearAdd"], counts["QGemm"], counts["QLinearConcat"]) == (2, 1, 1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    ints = [i for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1]
    assert sum(len(one.raw_data) for one in ints) == weights


def test_plans_are_in_the_file(tmp_path: Path) -> None:
    model = settled(Net())
    fxslim.prune(model, X, ratio=0.3)
    fxslim.sparsify(model, "2:4", example_inputs=X, layers=["blocks*"])
    fxslim.quantize(model, "int8", data=[X], example_inputs=X)
    export_onnx(model, X, tmp_path / "m.onnx", input_names=["image"], output_names=["scores"])
    written = onnx.load(tmp_path / "m.onnx")
    facts = {one.key: one.value for one in written.metadata_props}
    assert [plan["kind"] for plan in json.loads(facts["fxslim.plans"])] == ["pruning", "sparsity", "quantization"]
    assert written.producer_name == "fxslim"
    assert ([i.name for i in written.graph.input], [o.name for o in written.graph.output]) == (["image"], ["scores"])
    assert not [i for i in written.graph.initializer if i.data_type == onnx.TensorProto.BOOL]


def test_sizes_that_change(tmp_path: Path) -> None:
    model, path = quantized(), tmp_path / "m.onnx"
    batch = torch.export.Dim("batch", max=64)
    export_onnx(model, X, path, dynamic_shapes=({0: batch, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},))
    other = torch.randn(7, 3, 24, 16)
    found = verify_onnx(model, path, [other])
    assert found.relative <= max(0.01, 3 * found.rounding)
    assert run(str(path), other)[0].shape == (7, 5)


def test_memory_formats_leave_no_trace(tmp_path: Path) -> None:
    """torch's exporter writes Range, Gather and more for a view of what lies channels_last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x, kinds = torch.randn(2, 3, 8, 8), []
    for number in range(4):
        one = copy.deepcopy(model).to(memory_format=torch.channels_last if number & 1 else torch.contiguous_format)
        given = x.to(memory_format=torch.channels_last) if number & 2 else x
        path = tmp_path / f"{number}.onnx"
        export_onnx(one, given, path, dynamic_shapes=({0: "batch"},))
        kinds.append([node.op_type for node in onnx.load(path).graph.node])
        assert one[0].weight.is_contiguous(memory_format=torch.channels_last) == bool(number & 1)
    assert kinds[1:] == kinds[:1] * 3


def test_float_models_and_masks(tmp_path: Path) -> None:
    model = settled(Net())
    fxslim.sparsify(model, "2:4", example_inputs=X)
    found = export_onnx(model, (X,), tmp_path / "m.onnx")
    assert found is not None
    assert found.relative < 1e-5
    assert "QuantizeLinear" not in operators(str(tmp_path / "m.onnx"))
    assert not [i for i in onnx.load(tmp_path / "m.onnx").graph.initializer if i.data_type == onnx.TensorProto.BOOL]


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "ascend"])
def test_other_targets(tmp_path: Path, target: str) -> None:
    model, path = quantized(target), tmp_path / "m.onnx"
    export_onnx(model, X, path, target=target)
    kinds = {i.data_type for i in onnx.load(path).graph.initializer if i.name.endswith("zero_point") and not i.dims}
    assert kinds <= {onnx.TensorProto.UINT8 if target == "openvino" else onnx.TensorProto.INT8}
    with pytest.raises(ExportError, match=rf"prepared for '{target}', whose grids are not those of 'onnxruntime'"):
        export_onnx(model, X, path, target="onnxruntime")
    if target != "ascend":
        with pytest.raises(ExportError, match="'ascend': prepare the float model with target='ascend'"):
            export_onnx(model, X, path, form="deploy")


def test_forms_of_amct(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3))
    config = fxslim.QuantConfig(weight=fxslim.nn.WeightQuant(granularity="tensor"))
    fxslim.quantize(model.eval(), config, data=[X], example_inputs=X, target="ascend")
    found = export_onnx(model, X, tmp_path / "simulated.onnx", form="fake_quant")
    assert found is not None
    assert not {"QuantizeLinear", "DequantizeLinear"} & operators(str(tmp_path / "simulated.onnx")).keys()
    for form in ("deploy", "ascend"):
        assert export_onnx(model, X, tmp_path / "d.onnx", form=form) is None
        assert {"AscendQuant", "AscendDequant"} <= operators(str(tmp_path / "d.onnx")).keys()


class Unwritable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x.flatten(1)


def test_refused(tmp_path: Path) -> None:
    model, path = quantized(), tmp_path / "m.onnx"
    path.write_text("before")
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: export_onnx(model, X, path, form="qqd"), ConfigError, "unknown form 'qqd'.*did you mean 'qdq'"),
        (lambda: export_onnx(model, X, path, opset=12), ExportError, "opset=12 is below 18"),
        (
            lambda: export_onnx(model, X, path, dynamic_shapes=({}, {})),
            ConfigError,
            "dynamic_shapes",
        ),
        (
            lambda: export_onnx(model, X, path, dynamic_shapes="batch"),
            ConfigError,
            "dynamic_shapes='batch' does not fit",
        ),
        (lambda: export_onnx(Unwritable(), X, path), ExportError, "can't write the model with Inputs"),
        (lambda: export_onnx(model, X, tmp_path / "no" / "m.onnx"), ExportError, "give a file in a folder that exists"),
        (lambda: export_onnx(model, X, tmp_path), ExportError, "is a folder"),
        (lambda: export_onnx(nn.DataParallel(model), X, path), fxslim.FxslimError, "DataParallel"),
        (
            lambda: export_onnx(fxslim.prepare_qat(Net(), example_inputs=X), X, path),
            CalibrationError,
            r"has no range yet: it has seen 0 of 1 training batches; train on, or run fxslim\.quantize",
        ),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_text() == "before"


def test_a_file_that_disagrees_is_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(written: Any, **settings: Any) -> Any:
        for value in written.graph.initializers.values():
            if (
                value.const_value is not None
                and value.const_value.dtype.name == "INT8"
                and value.const_value.size > 100
            ):
                value.const_value.raw.data.zero_()
        return onnx_export_settle(written, **settings)

    onnx_export_settle = onnx_export.settle
    monkeypatch.setattr(onnx_export, "settle", broken)
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"differs from the model by .* kept aside as .*m\.disagrees\.onnx") as caught:
        export_onnx(quantized(), X, path)
    assert "same argmax" in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["m.disagrees.onnx"]
    onnx.checker.check_model(str(tmp_path / "m.disagrees.onnx"))
    export_onnx(quantized(), X, path, verify=False)
    assert path.is_file()


def test_verification_refuses(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="is no file: export_onnx"):
        verify_onnx(model, path, X)
    export_onnx(model, X, path)
    with pytest.raises(ConfigError, match=r"takes 1 inputs \(input\), Inputs\(.*\) has 2 tensors"):
        verify_onnx(model, path, (X, X))
    with pytest.raises(ConfigError, match=r"input input is \[4, 3, 16, 16\], got \[2, 3, 16, 16\]"):
        verify_onnx(model, path, X[:2])
    other = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    assert verify_onnx(other, path, X).relative > 0.1
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match="does not load"):
        verify_onnx(model, path, X)


def test_verification_leaves_the_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    export_onnx(model, X, tmp_path / "m.onnx")
    model.train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    verify_onnx(model, tmp_path / "m.onnx", X)
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
