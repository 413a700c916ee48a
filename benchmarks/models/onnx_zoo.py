# SPDX-License-Identifier: Apache-2.0
"""Quantizes, exports and runs torchvision's models and small transformers: ONNX Runtime beside torch.

    python -m benchmarks.models.onnx_zoo [--only GLOB...] [--missing] [--report FOLDER]

With ``--only``, the lines of all other models stay as they are in a report of the same day; with ``--missing``, models
that have a line are left out. Weights are random, of order 1; nothing is downloaded.
"""

import argparse
import datetime
import fnmatch
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
from fxslim.export import OnnxVerification, export_onnx, verify_onnx

TOLERANCE = 0.01


def num_bytes(model: nn.Module) -> int:
    """What the float model's parameters and buffers take: a float file is as large."""
    return sum(state.numel() * state.element_size() for state in [*model.parameters(), *model.buffers()])


def verdict(seen: OnnxVerification) -> str:
    """OK within the tolerance; ROUNDING beyond it, but as near as three times what float64 changes in torch."""
    if seen.relative <= TOLERANCE:
        return "OK"
    return "ROUNDING" if seen.relative <= 3 * seen.rounding else "APART"


def row(name: str) -> str:
    """One line of the report."""
    start = time.process_time()
    model, x = build(name)
    float_bytes = num_bytes(model)
    skip = TRAINING_HEADS.get(name, ())
    fxslim.quantize(model, "int8", data=[x], example_inputs=x, target="onnxruntime", skip=skip)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, x, path, verify=False)
        seen = verify_onnx(model, path, x)
        found = operators(path)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    cells = [
        name,
        verdict(seen),
        str(x.shape[-1]),
        in_float(found),
        str(in_integers(found)),
        f"{size / float_bytes:.2f}",
        f"{seen.relative:.2g}",
        f"{seen.rounding:.2g}",
        f"{seen.relative_here:.2g}",
        f"{seen.argmax:.0%}",
        f"{time.process_time() - start:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def guarded_row(name: str) -> str:
    """A line for a model that fails or is left out, too."""
    if name in TOO_LARGE:
        return f"| {name} | LEFT OUT | | {TOO_LARGE[name]} | | | | | | | |"
    torch.manual_seed(0)
    try:
        return row(name)
    except Exception as error:
        told = " ".join(str(error).split()).replace("|", "/")[:300]
        return f"| {name} | FAILED | | {type(error).__name__}: {told} | | | | | | | |"


def known_lines(path: Path) -> dict[str, str]:
    """Lines of a report, by model."""
    found = [line for line in path.read_text().splitlines() if line.startswith("| ")] if path.exists() else []
    return {line.split("|")[1].strip(): line for line in found if not line.startswith("| model |")}


def write(path: Path, lines: dict[str, str]) -> None:
    """The whole report."""
    counts = {word: sum(f"| {word} |" in line for line in lines.values()) for word in ("OK", "ROUNDING", "APART")}
    ran = [line.split("|")[4].strip() for line in lines.values() if any(f"| {word} |" in line for word in counts)]
    head = [
        f"# Models exported to ONNX and run by ONNX Runtime, {datetime.date.today()}", "",
        f"{machine()}, torchvision {torchvision.__version__}, onnxruntime {onnxruntime.__version__}", "",
        f"{len(ran)} of {len(lines)} quantized with `fxslim.quantize(model, \"int8\", target=\"onnxruntime\")` on a",
        f"batch of {BATCH} random inputs, exported with `export_onnx`, loaded and run: {counts['OK']} OK, relative L2",
        f"to the quantized torch model at most {TOLERANCE:.0%}; {counts['ROUNDING']} ROUNDING, more, but at most three",
        f"times `rounding`, which is what float64 alone changes in torch; {counts['APART']} APART, more than that.",
        f"In {ran.count('none')} nothing that multiplies or adds is left in float. Weights are random, of order 1: a",
        "rounding that falls to the other side grows from layer to layer, as it does not in a trained model.", "",
        *saturation_note(), "",
        "`left in float`: of Conv, Gemm, MatMul, Add and BatchNormalization, after ONNX Runtime's own optimizations;",
        "`integer`: operators in integers; `size`: of the file over the float model's parameters and buffers;",
        "`relative`: of the operators one by one, without saturation; `here`: of the optimized file on this processor;",
        "`argmax`: how often the largest entry of a row of the output is the same; seconds of CPU time for all of it.",
        "Of detectors the backbone, the feature pyramid and the dense head are exported (of R-CNNs that of region",
        "proposals), since boxes are chosen outside of what is quantized. Reproduce: `make onnx-zoo`.", "",
        "| model | | pixels | left in float | integer | size | relative | rounding | here | argmax | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
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
