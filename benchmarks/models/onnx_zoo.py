# SPDX-License-Identifier: Apache-2.0
"""Quantizes, exports and runs torchvision's models and small transformers: ONNX Runtime beside torch.

    python -m benchmarks.models.onnx_zoo [--only GLOB...] [--missing] [--report FOLDER]

With ``--only``, the lines of all other models stay as they are in a report of the same day; with ``--missing``, models
that have a line are left out. Weights are random, of order 1; nothing is downloaded.
"""

import argparse
import datetime
import fnmatch
import re
import tempfile
import time
import warnings
from pathlib import Path

import onnxruntime
import torch
import torchvision
from torch import nn

import fxslim
from benchmarks.models.onnx_models import BATCH, NAMES, TOO_LARGE, TRAINING_HEADS, build
from benchmarks.models.onnx_operators import in_float, in_integers, operators
from benchmarks.models.onnx_speed import saturation_note
from benchmarks.timing import machine
from fxslim.export import OnnxVerification, export_onnx
from fxslim.graph.inputs import output_tensors

TOLERANCE = 0.01
# What the last places of float32 come to; one value on another step of a grid is more.
_LAST_PLACES = 1e-6
PASSED = ("OK", "BIASES", "ROUNDING")
COLUMNS = (
    "model", "", "input", "left in float", "integer", "size", "quantized", "relative", "here", "one by one",
    "float biases", "rounding", "argmax", "seconds",
)  # fmt: skip


def num_bytes(model: nn.Module) -> int:
    """What the float model's parameters and buffers take: a float file is as large."""
    return sum(state.numel() * state.element_size() for state in [*model.parameters(), *model.buffers()])


def verdict(seen: OnnxVerification) -> str:
    """OK within the tolerance; BIASES: so with biases in float; ROUNDING: within three times what rounding changes."""
    if seen.relative <= TOLERANCE:
        return "OK"
    alone = seen.with_float_biases
    return "BIASES" if alone is not None and alone <= TOLERANCE else "ROUNDING"


def row(name: str) -> str:
    """One line of the report."""
    start = time.process_time()
    model, x = build(name)
    float_bytes = num_bytes(model)
    with torch.no_grad():
        wanted = output_tensors(model(x))
        skip = TRAINING_HEADS.get(name, ())
        fxslim.quantize(model, "int8", data=[x], example_inputs=x, target="onnxruntime", skip=skip)
        got = output_tensors(model(x))
    error = max(float((a - b).norm() / a.norm()) for a, b in zip(wanted, got, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        # Raises where the file is further from the model than rounding explains.
        seen = export_onnx(model, x, path, tolerance=TOLERANCE)
        assert seen is not None
        found = operators(path)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    cells = [
        name,
        verdict(seen),
        str(x.shape[-1]),
        in_float(found),
        str(in_integers(found)),
        f"{size / float_bytes:.2f}",
        f"{error:.2g}",
        f"{seen.relative:.2g}",
        f"{seen.relative_here:.2g}",
        f"{seen.relative_one_by_one:.2g}",
        "" if seen.with_float_biases is None else f"{seen.with_float_biases:.2g}",
        f"{seen.rounding:.2g}",
        f"{seen.argmax:.0%}",
        f"{time.process_time() - start:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def guarded_row(name: str) -> str:
    """A line for a model that fails or is left out, too."""
    empty = " |" * (len(COLUMNS) - 3)
    if name in TOO_LARGE:
        return f"| {name} | LEFT OUT | | {TOO_LARGE[name]}{empty}"
    torch.manual_seed(0)
    try:
        return row(name)
    except Exception as error:
        # Without the folders of this machine.
        told = re.sub(r"/\S+/", "", " ".join(str(error).split())).replace("|", "/")[:500]
        return f"| {name} | FAILED | | {type(error).__name__}: {told}{empty}"


def known_lines(path: Path) -> dict[str, str]:
    """Lines of a report, by model."""
    found = [line for line in path.read_text().splitlines() if line.startswith("| ")] if path.exists() else []
    return {line.split("|")[1].strip(): line for line in found if not line.startswith("| model |")}


def write(path: Path, lines: dict[str, str]) -> None:
    """The whole report."""
    counts = {word: sum(f"| {word} |" in line for line in lines.values()) for word in (*PASSED, "FAILED", "LEFT OUT")}
    passed = [line.split("|") for line in lines.values() if any(f"| {word} |" in line for word in PASSED)]
    ran, exact = [row[4].strip() for row in passed], sum(float(row[8]) < _LAST_PLACES for row in passed)
    head = [
        f"# Models exported to ONNX and run by ONNX Runtime, {datetime.date.today()}", "",
        f"{machine()}, torchvision {torchvision.__version__}, onnxruntime {onnxruntime.__version__}", "",
        f"{len(ran)} of {len(lines)} quantized with `fxslim.quantize(model, \"int8\", target=\"onnxruntime\")` on a",
        f"batch of {BATCH} random inputs, exported with `export_onnx`, loaded and run; {counts['FAILED']} FAILED,",
        f"{counts['LEFT OUT']} LEFT OUT, {len(NAMES) - len(lines)} not run yet. In {ran.count('none')} nothing that",
        "multiplies or adds is left in float.", "",
        f"- OK ({counts['OK']}): relative L2 to the quantized torch model is at most {TOLERANCE:.0%}. In {exact} rows",
        f"  it is below {_LAST_PLACES:.0e}: no value on a grid differs.",
        f"- BIASES ({counts['BIASES']}): more, but at most {TOLERANCE:.0%} with biases in float. Integer kernels add",
        "  biases of int32, which are up to half a step of the sums off.",
        f"- ROUNDING ({counts['ROUNDING']}): more, but (with biases in float) at most three times `rounding`, which is",
        "  what float64, or numbers moved by some last places before they are rounded, change in the torch model.", "",
        "Weights are random, of order 1, unlike a trained model's: one value that is rounded to the other side changes",
        "more of them from layer to layer. The model in eval mode rounds sums of products as integer kernels do, and",
        "calibration keeps what is computed from one or two tensors on grids clear of middles between two steps.",
        "What is left: operators in float between two grids, as layer norm, softmax, GELU and a batch norm behind a",
        "join, give other last places. `quantized`: relative L2 of the quantized torch model to the float one.", "",
        *saturation_note("here", "relative"), "",
        "`left in float`: of Conv, Gemm, MatMul, Add and BatchNormalization, after ONNX Runtime's own optimizations;",
        "`integer`: operators in integers; `size`: of the file over the float model's parameters and buffers;",
        "`relative`: of the optimized file, with exact products; `here`: on this processor; `one by one`: operators in",
        "float between Q and DQ, without optimizations; `argmax`: how often the largest entry of a row of the output",
        "is the same; seconds of CPU time for all of it.",
        "Of detectors the backbone, the feature pyramid and the dense head are exported (of R-CNNs that of region",
        "proposals), since boxes are chosen outside of what is quantized. Reproduce: `make onnx-zoo`.", "",
        "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|",
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head, *(lines[name] for name in sorted(lines)), ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = options.report / f"{datetime.date.today()}-onnx-zoo.md"
    for name in NAMES:
        wanted = any(fnmatch.fnmatch(name, glob) for glob in options.only)
        if not wanted or (options.missing and name in known_lines(path)):
            continue
        line = guarded_row(name)
        print(line, flush=True)
        # Read anew: another process may write lines of other models meanwhile.
        write(path, known_lines(path) | {name: line})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
