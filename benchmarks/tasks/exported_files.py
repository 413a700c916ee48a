# SPDX-License-Identifier: Apache-2.0
"""Files of a trained network, ours and those of ONNX Runtime's own quantizer, and what they give on unseen images."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationMethod
from torch import Tensor, nn

import fxslim
from benchmarks.models.onnx_operators import session
from benchmarks.models.onnx_speed import write_float, write_theirs
from benchmarks.tasks.contest import RECIPES, Contest
from benchmarks.tasks.training import train
from fxslim import QuantConfig
from fxslim.export import export_onnx
from fxslim.nn import WeightQuant

SIZE = 250
Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to a file. ``simulated`` gives the model that is exported; without one the file is ONNX Runtime's.

    ``thorough``: run as this machine runs it, too. ``trains``: it has left the float model's weights.
    """

    name: str
    simulated: Callable[["Task"], nn.Module] | None = None
    method: Any = None
    thorough: bool = False
    trains: bool = False


class Task:
    """A trained network, the batches that all calibrate on, and the images that all are tested on."""

    def __init__(self, contest: Contest, net: str, seed: int, epochs: float) -> None:
        self.contest, self.net, self.seed, self.epochs = contest, net, seed, epochs
        self.base = contest.base(net, seed)
        self.example = contest.batches[0][0]

    @functools.cached_property
    def wanted(self) -> Tensor:
        """The float model's logits."""
        return self.logits(self.base)

    def logits(self, run: Runner) -> Tensor:
        """Of all unseen images."""
        with torch.no_grad():
            return torch.cat([run(images) for images, _ in self.contest.unseen.batches(self._count, SIZE)])

    def accuracy(self, logits: Tensor) -> float:
        """In percent."""
        return same(logits.argmax(1), self.contest.unseen.labels)

    @property
    def _count(self) -> int:
        return len(self.contest.unseen.labels)


def calibrated(task: Task, *, config: Any = "int8", calibration: str = "mse") -> nn.Module:
    """fxslim's, nothing trained."""
    return fxslim.quantize(
        copy.deepcopy(task.base), config, data=task.contest.batches, calibration=calibration,
        example_inputs=task.example, target="onnxruntime",
    )  # fmt: skip


def trained(task: Task) -> nn.Module:
    """fxslim's, trained on its grids for a while."""
    recipe = replace(RECIPES[task.net], epochs=task.epochs, rate=RECIPES[task.net].rate / 4)
    model = fxslim.prepare_qat(
        copy.deepcopy(task.base), "int8", example_inputs=task.example, target="onnxruntime"
    )  # fmt: skip
    return train(model, task.contest.pictures, recipe, 1000 + task.seed)


_HALF = QuantConfig(weight=WeightQuant(reduce_range=True))
ROWS = (
    Row(name="fxslim, mse (default)", simulated=calibrated, thorough=True),
    Row(name="quantize_static, MinMax", method=CalibrationMethod.MinMax, thorough=True),
    Row(name="fxslim, min_max", simulated=functools.partial(calibrated, calibration="min_max")),
    Row(name="fxslim, mse, reduce_range", simulated=functools.partial(calibrated, config=_HALF), thorough=True),
    Row(name="fxslim, trained", simulated=trained, thorough=True, trains=True),
    Row(name="quantize_static, Percentile", method=CalibrationMethod.Percentile),
    Row(name="quantize_static, Entropy", method=CalibrationMethod.Entropy),
    *(
        Row(name=f"fxslim, {name}", simulated=functools.partial(calibrated, calibration=name))
        for name in ("ifmr", "percentile", "entropy")
    ),
)


def measured(row: Row, task: Task, folder: Path) -> dict[str, float]:
    """Accuracies and agreements in percent, relative L2 distances; by name."""
    torch.manual_seed(task.seed)
    path = folder / "file.onnx"
    found: dict[str, float] = {}
    model = None if row.simulated is None else row.simulated(task).eval()
    if model is None:
        _write_theirs(task, row.method, path)
    else:
        export_onnx(model, task.example, path, target="onnxruntime")
    precise = task.logits(_runner(_precise_session(path)))
    found["precise"] = task.accuracy(precise)
    if not row.trains:
        found["far from float"] = distance(precise, task.wanted)
    if row.thorough:
        here = task.logits(_runner(session(path)))
        one_by_one = task.logits(_runner(session(path, exact=True)))
        found |= {"here": task.accuracy(here), "one by one": task.accuracy(one_by_one)}
        if not row.trains:
            found |= {
                "far from float here": distance(here, task.wanted),
                "far from float, one by one": distance(one_by_one, task.wanted),
            }
    return found if model is None else found | _beside_simulated(task, model, precise)


def _beside_simulated(task: Task, model: nn.Module, logits: Tensor) -> dict[str, float]:
    simulated = task.logits(model)
    return {
        "simulated": task.accuracy(simulated),
        "same": same(logits.argmax(1), simulated.argmax(1)),
        "apart": distance(logits, simulated),
    }


def same(one: Tensor, other: Tensor) -> float:
    """How often, in percent."""
    return 100 * float((one == other).double().mean())


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative L2."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def _runner(runner: onnxruntime.InferenceSession) -> Runner:
    name = runner.get_inputs()[0].name
    return lambda images: torch.from_numpy(np.array(runner.run(None, {name: images.numpy()})[0]))


def _precise_session(path: Path) -> onnxruntime.InferenceSession:
    """Integer kernels whose sums never saturate, whatever the processor."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _write_theirs(task: Task, method: Any, path: Path) -> None:
    """ONNX Runtime's own quantizer."""
    whole = path.with_suffix(".float.onnx")
    write_float(task.base, task.example, whole)
    write_theirs(whole, [images for images, _ in task.contest.batches], path, calibrate_method=method)
