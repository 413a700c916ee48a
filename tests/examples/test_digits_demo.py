# SPDX-License-Identifier: Apache-2.0
"""The demo, trained for three steps a stage: its table is recomputed from its files, a second run writes the same."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxslim
from fxslim.export import verify_onnx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STAGES = ("float", "pruned", "compressed")
TIMES = re.compile(r" *[\d.]+$|[\d.]+x faster", re.M)


def few_digits(demo: ModuleType) -> tuple[torch.Tensor, ...]:
    images, labels, test_images, test_labels = demo.load_digits()
    return images[:192], labels[:192], test_images[:100], test_labels[:100]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The module, what two runs and a dense one printed, and their folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        demo = importlib.import_module("digits_demo")
        data = few_digits(demo)
        patch.setattr(demo, "load_digits", lambda: data)
        made = []
        for more in ([], [], ["--dense"]):
            folder = tmp_path_factory.mktemp("run") / "demo"
            printed: list[str] = []
            patch.setattr("builtins.print", lambda *values, to=printed: to.append(" ".join(map(str, values))))
            patch.setattr("sys.argv", ["digits_demo.py", "--epochs", "1", "--out", str(folder), *more])
            demo.main()
            made.append((folder, "\n".join(printed)))
        return demo, data, made


@pytest.fixture(scope="module")
def table(runs) -> dict[str, list[str]]:
    lines = runs[2][0][1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["accuracy"])
    return {line.split()[0]: line.split()[1:] for line in lines[start + 1 : start + 4]}


def loaded(runs, stage: str) -> nn.Module:
    demo, _, made = runs
    return fxslim.load(demo.SmallResNet(), made[0][0] / f"{stage}.safetensors").eval()


def session(path: Path, **settings: object) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_figure_is_that_of_the_file(runs, table, stage: str) -> None:
    _, (_, _, images, labels), made = runs
    path = made[0][0] / f"{stage}.onnx"
    accuracy, weights, not_0, kind, size, latency = table[stage]
    net = session(path)
    right = [
        int(net.run(None, {"image": x[None].numpy()})[0].argmax()) == y for x, y in zip(images, labels, strict=True)
    ]
    assert accuracy == f"{np.mean(right):.2%}"
    layers = [m for m in loaded(runs, stage).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    computed = [m.computed() if stage == "compressed" else m.weight for m in layers]
    assert weights == f"{sum(w.numel() for w in computed):,}"
    assert not_0 == f"{sum(int(w.count_nonzero()) for w in computed):,}"
    assert kind == ("int8" if stage == "compressed" else "float32")
    assert size == f"{len(path.read_bytes()):,}"
    assert float(latency) > 0


def test_the_last_lines_sum_up_the_table(runs, table) -> None:
    text = runs[2][0][1]
    sizes = {stage: int(cells[4].replace(",", "")) for stage, cells in table.items()}
    times = {stage: float(cells[5]) for stage, cells in table.items()}
    smaller, faster = map(float, re.search(r"([\d.]+)x smaller, ([\d.]+)x faster", text).groups())
    assert smaller == pytest.approx(sizes["float"] / sizes["compressed"], abs=0.06)
    assert faster == pytest.approx(times["float"] / times["compressed"], rel=0.02, abs=0.06)
    for path in re.search(r"Wrote (.*), a \.safetensors", text).group(1).split(", "):
        assert Path(path).is_file()


def test_the_compressed_file_is_2_of_4_and_runs_in_integers(runs, tmp_path) -> None:
    folder = runs[2][0][0]
    weights = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in onnx.load(folder / "compressed.onnx").graph.initializer
        if len(one.dims) >= 2
    }
    assert len(weights) == 10
    for name, weight in weights.items():
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(int)).max() <= 64
        whole = weight[:, : weight.shape[1] // 4 * 4]
        groups = (whole != 0).reshape(len(whole), -1, 4, *whole.shape[2:])
        assert (groups.sum(2) <= 2).all(), name
    optimized = tmp_path / "optimized.onnx"
    session(folder / "compressed.onnx", optimized_model_filepath=str(optimized), log_severity_level=3)
    kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    assert kinds.count("QLinearConv") == 9
    assert not {"Conv", "Gemm", "MatMul", "Add", "Relu", "BatchNormalization"} & set(kinds)


@pytest.mark.parametrize("stage", STAGES)
def test_the_file_answers_as_the_saved_model(runs, stage: str) -> None:
    _, (_, _, images, _), made = runs
    found = verify_onnx(loaded(runs, stage), made[0][0] / f"{stage}.onnx", images)
    assert max(found.relative, found.relative_here) < (0.05 if stage == "compressed" else 1e-5)


def test_two_runs_differ_in_times_alone(runs) -> None:
    (one, said), (other, said_again), _ = runs[2]
    assert TIMES.sub("", said).replace(str(one), "") == TIMES.sub("", said_again).replace(str(other), "")
    for stage in STAGES:
        assert (one / f"{stage}.onnx").read_bytes() == (other / f"{stage}.onnx").read_bytes(), stage
        saved, saved_again = (load_file(folder / f"{stage}.safetensors") for folder in (one, other))
        assert saved.keys() == saved_again.keys()
        assert all(torch.equal(value, saved_again[name]) for name, value in saved.items()), stage


def test_dense_leaves_the_masks_out(runs) -> None:
    (masked, _), _, (dense, said) = runs[2]
    weights = [
        onnx.numpy_helper.to_array(one)
        for one in onnx.load(dense / "compressed.onnx").graph.initializer
        if len(one.dims) >= 2
    ]
    assert np.mean(np.concatenate([weight.ravel() for weight in weights]) != 0) > 0.8
    assert "2:4" not in said
    assert (dense / "pruned.onnx").read_bytes() == (masked / "pruned.onnx").read_bytes()
