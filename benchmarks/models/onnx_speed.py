# SPDX-License-Identifier: Apache-2.0
"""Speed of exported files in ONNX Runtime, beside the float file and ONNX Runtime's own static quantizer.

    python -m benchmarks.models.onnx_speed [--only GLOB...] [--rounds 40] [--report FOLDER]

One thread of the CPU, process-CPU time, contestants take turns in one process; figures are medians of ratios in the
same round. Weights are random, with norms settled; nothing is downloaded.
"""

import argparse
import copy
import datetime
import fnmatch
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torchvision.models import get_model

import fxslim
from benchmarks.models.onnx_operators import in_float, in_integers, operators, session
from benchmarks.models.zoo import settle_norms
from benchmarks.timing import machine, median_ratio, take_turns
from fxslim.export import export_onnx
from fxslim.export.onnx_verification import has_exact_products

NETS = ("resnet18", "resnet50", "mobilenet_v2")
SHAPES = ((16, 3, 64, 64), (1, 3, 224, 224))
NUM_BATCHES = 8
# Ours by two choices of ranges: the one that theirs uses, and fxslim's own.
OURS = {"fxslim, min_max": "min_max", "fxslim, mse": "mse"}
THEIRS = "quantize_static, MinMax"
COLUMNS = (
    "model", "input", "file", "ms", "over float", "over theirs", "left in float", "integer", "size", "L2 exact",
    "L2 here",
)  # fmt: skip


class Batches(CalibrationDataReader):
    """Calibration batches as ONNX Runtime asks for them."""

    def __init__(self, batches: list[Tensor], name: str) -> None:
        self._left: Iterator[Tensor] = iter(batches)
        self._name = name

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {self._name: batch.numpy()}


def write_float(model: nn.Module, x: Tensor, path: Path) -> None:
    """The model as torch writes it, in one file."""
    torch.onnx.export(
        model, (x,), path, dynamo=True, external_data=False, verbose=False, input_names=["x"], output_names=["y"]
    )


def write_theirs(float_file: Path, batches: list[Tensor], path: Path, **wishes: Any) -> None:
    """ONNX Runtime's own quantizer, as its guide says: shapes inferred and the graph optimized before."""
    wishes = {"calibrate_method": CalibrationMethod.MinMax} | wishes
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(float_file, prepared)
    quantize_static(
        prepared,
        path,
        Batches(batches, "x"),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **wishes,
    )


def write_ours(model: nn.Module, batches: list[Tensor], path: Path, calibration: str) -> None:
    """fxslim's file; not verified here, where only its speed and its distance from the float model count."""
    quantized = fxslim.quantize(
        copy.deepcopy(model),
        "int8",
        data=batches,
        calibration=calibration,
        example_inputs=batches[0],
        target="onnxruntime",
    )
    export_onnx(quantized, batches[0], path, input_names=["x"], output_names=["y"], verify=False)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Files of one model at one size, and batches that none was calibrated on."""

    files: dict[str, Path]
    held_out: list[Tensor]
    expected: list[Tensor]

    def error(self, name: str, *, exact: bool) -> float:
        """Relative L2 error to the float model in torch."""
        runner = session(self.files[name], exact=exact)
        got = [torch.from_numpy(np.asarray(runner.run(None, {"x": batch.numpy()})[0])) for batch in self.held_out]
        wanted = torch.cat(self.expected)
        return float((torch.cat(got) - wanted).norm() / wanted.norm())

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """CPU time of each run, by contestant."""
        feed = {"x": self.held_out[0].numpy()}

        def run(path: Path) -> Callable[[], object]:
            runner = session(path)
            return lambda: runner.run(None, feed)

        return take_turns({name: run(path) for name, path in self.files.items()}, torch.device("cpu"), rounds)


def contest(net: str, shape: tuple[int, ...], folder: Path) -> Contest:
    """All files of one model at one size."""
    torch.manual_seed(0)
    model = get_model(net, weights=None).eval()
    settle_norms(model, fxslim.Inputs(torch.randn(16, *shape[1:])))
    batches = [torch.randn(shape) for _ in range(NUM_BATCHES)]
    held_out = [torch.randn(shape) for _ in range(NUM_BATCHES)]
    files = {name: folder / f"{number}.onnx" for number, name in enumerate(["float", *OURS, THEIRS])}
    write_float(model, batches[0], files["float"])
    write_theirs(files["float"], batches, files[THEIRS])
    for name, calibration in OURS.items():
        write_ours(model, batches, files[name], calibration)
    with torch.no_grad():
        expected = [model(batch) for batch in held_out]
    return Contest(files=files, held_out=held_out, expected=expected)


def rows(net: str, shape: tuple[int, ...], rounds: int) -> list[str]:
    """Lines of one model at one size."""
    with tempfile.TemporaryDirectory() as folder:
        made = contest(net, shape, Path(folder))
        seconds = made.seconds(rounds)
        lines = []
        for name, path in made.files.items():
            found, times = operators(path), seconds[name]
            ratios = [a / b for a, b in zip(seconds["float"], times, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            cells = [
                net,
                f"{shape[0]} x {shape[-1]} pixels",
                name,
                f"{statistics.median(times) * 1e3:.1f}",
                f"{median_ratio(seconds['float'], times):.2f} ({low:.2f} to {high:.2f})",
                f"{median_ratio(seconds[THEIRS], times):.3f}",
                in_float(found),
                str(in_integers(found)),
                f"{path.stat().st_size / made.files['float'].stat().st_size:.2f}",
                f"{made.error(name, exact=True):.4f}",
                f"{made.error(name, exact=False):.4f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def saturation_note(here: str = "L2 here", exact: str = "L2 exact") -> list[str]:
    """What this processor does to integer products; in these columns."""
    if has_exact_products():
        return [f"This processor sums integer products in 32 bits (VNNI): `{here}` is what any such processor gives."]
    return [
        "**This processor has no VNNI**: ONNX Runtime's kernels sum two products of uint8 and int8 in 16 bits, which",
        f"saturates; that is what `{here}` shows beside `{exact}`, and integer files gain less over float than on",
        "processors with VNNI.",
    ]


def report(nets: list[str], rounds: int) -> str:
    """The whole report; lines are printed as they come."""
    lines: list[str] = []
    for net in nets:
        for shape in SHAPES:
            found = rows(net, shape, rounds)
            print("\n".join(found), flush=True)
            lines += found
    return "\n".join([
        f"# Speed of exported files in ONNX Runtime, {datetime.date.today()}", "",
        f"{machine()}, onnxruntime {onnxruntime.__version__}", "",
        "`python -m benchmarks.models.onnx_speed`: one thread, process-CPU time, all four files take turns in one",
        f"process on a machine shared with others, {rounds} rounds after two to warm up. `over float`: median of float",
        "over file in the same round, with quartiles; `over theirs`: the same against",
        "`onnxruntime.quantization.quantize_static` (QDQ, int8 weights per channel, uint8 activations, MinMax), which",
        f"is calibrated on the same {NUM_BATCHES} batches.", "",
        *saturation_note(), "",
        "`left in float`: operators that multiply and add in float after ONNX Runtime's own optimizations; `integer`:",
        "how many compute in integers; `size`: of the file over the float file. `L2`: relative error to the float",
        f"model in torch on {NUM_BATCHES} other batches: `exact` with operators one by one, `here` as it runs on this",
        "machine.",
        "Weights are random and inputs noise. Reproduce: `make onnx-speed`.", "",
        "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|",
        *lines, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    nets = [net for net in NETS if any(fnmatch.fnmatch(net, glob) for glob in options.only)]
    text = report(nets, options.rounds)
    path = options.report / f"{datetime.date.today()}-onnx-speed.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
