# SPDX-License-Identifier: Apache-2.0
"""Exported files of trained networks beside the models they were made from, and ONNX Runtime's own quantizer's.

    python -m benchmarks.tasks.exported [--nets resnet mobilenet] [--seeds 1] [--epochs 0.25] [--report FOLDER]

Kept under build/tasks/: stop it, run it, it goes on. `--rows` runs some rows alone, and writes no report.
"""

import argparse
import datetime
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import onnxruntime
import torch

import fxslim
from benchmarks.tasks.contest import RECIPES, Contest, Settings
from benchmarks.tasks.exported_files import ROWS, SIZE, Row, Task, measured
from benchmarks.tasks.glyphs import CLASSES
from benchmarks.tasks.remembering import Memory, code_digest, digest, model_digest, source_digest
from benchmarks.timing import machine
from fxslim.export.onnx_verification import has_exact_products

COMPUTED_BY = (*sorted(Path(fxslim.__file__).parent.rglob("*.py")), Path(__file__).with_name("exported_files.py"))
# The column's title, what it shows, and how.
COLUMNS = (
    ("simulated", "simulated", ".2f"),
    ("file", "precise", ".2f"),
    ("here", "here", ".2f"),
    ("one by one", "one by one", ".2f"),
    ("same argmax", "same", ".2f"),
    ("L2", "apart", ".4f"),
    ("**L2 to float**", "far from float", ".4f"),
    ("L2 to float, here", "far from float here", ".4f"),
    ("L2 to float, one by one", "far from float, one by one", ".4f"),
)
DEFAULT = ROWS[0]
Found = dict[str, float]


def found_by(row: Row, task: Task, code: str) -> Found:
    """What one row measures on one trained network, now or in an earlier run."""
    contest = task.contest
    counts = len(contest.pictures.labels), len(contest.unseen.labels), contest.settings.calibration
    versions = torch.__version__, onnxruntime.__version__
    key = digest("exported", row.name, code, versions, task.seed, model_digest(task.base), counts, task.epochs)
    with tempfile.TemporaryDirectory() as folder:
        return contest.memory.numbers(key, lambda: measured(row, task, Path(folder)))


def line(model: str, row: Row, found: Found) -> str:
    """One of the table."""
    cells = [format(found[name], how) if name in found else "" for _, name, how in COLUMNS]
    return "| " + " | ".join([model, row.name, *cells]) + " |"


def lines_of(task: Task, rows: list[Row], code: str) -> tuple[list[str], str]:
    """The lines of one trained network, and a sentence about who is nearest to it."""
    model = f"{task.net} {task.seed}"
    lines = [line(model, Row(name="float"), {"simulated": task.contest.accuracy(task.base)})]
    print(lines[0], flush=True)
    found: dict[Row, Found] = {}
    for row in rows:
        start = time.perf_counter()
        found[row] = found_by(row, task, code)
        lines.append(line(model, row, found[row]))
        print(f"{lines[-1]} ({time.perf_counter() - start:.0f} s)", flush=True)
    return lines, nearest(model, {row: one["far from float"] for row, one in found.items() if not row.trains})


def nearest(model: str, far: dict[Row, float]) -> str:
    """fxslim's default beside each of ONNX Runtime's files."""
    theirs = {row: value for row, value in far.items() if row.simulated is None}
    if DEFAULT not in far or not theirs:
        return ""
    ratios = ", ".join(f"{far[DEFAULT] / value:.2f} of {row.name}" for row, value in theirs.items())
    return f"- {model}: the distance of {DEFAULT.name} to the float model is {ratios}."


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(RECIPES), default=["resnet", "mobilenet"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=0.25, help="of training on the grids")
    parser.add_argument("--images", type=int, default=20_000, help=f"unseen, a multiple of {SIZE}")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="runs these alone")
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    if options.images % SIZE:
        parser.error(f"--images {options.images} is no multiple of {SIZE}, the batch that the files take")
    return options


def saturation_note() -> list[str]:
    """What `here` means where sums of integer products can be cut off."""
    if has_exact_products():
        return []
    return ["**This processor has no VNNI**: sums of two products saturate in 16 bits, which is what `here` shows.", ""]


def head(options: argparse.Namespace) -> list[str]:
    text = f"""Letters in {len(CLASSES)} classes, 3x32x32, 60,000 training and {options.images:,} test images, generated
    (`benchmarks/tasks/`); a model is a network and the seed of its training. All are calibrated on the same 2,000
    training images in batches of {SIZE}; "trained": {options.epochs:g} epochs on the grids instead. fxslim's are of
    target "onnxruntime", INT8; quantize_static is ONNX Runtime's (QDQ, int8 weights per channel, uint8 activations).
    Accuracy in percent: `simulated`, the model in torch; `file`, its file as ONNX Runtime optimizes it, with exact
    products (session.x64quantprecision=1); `here`, without that option on this machine; `one by one`, operators without
    optimizations, in float between Q and DQ. `same argmax` (percent of images) and `L2` (relative, of logits): the file
    beside the simulated model. `L2 to float`: the file's logits beside the float model's."""
    command = f"python -m benchmarks.tasks.exported --nets {' '.join(options.nets)} --seeds {options.seeds}"
    return [
        f"# Files of trained networks, {datetime.date.today()}", "",
        f"{machine()}, onnxruntime {onnxruntime.__version__}", "",
        *textwrap.wrap(" ".join(text.split()), 118, break_on_hyphens=False), "", *saturation_note(),
        f"Reproduce: `{command} --epochs {options.epochs:g} --images {options.images}` (`make onnx-tasks`).", "",
        "| model | file | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    memory = Memory(Path("build/tasks") / source_digest())
    contest = Contest(memory, Settings(epochs=options.epochs), 60_000, options.images)
    code = code_digest(COMPUTED_BY)
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    lines, sentences = [], []
    for net in options.nets:
        for seed in range(options.seeds):
            some, sentence = lines_of(Task(contest, net, seed, options.epochs), rows, code)
            lines += some
            sentences.append(sentence)
    if options.rows:
        return
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-exported.md"
    path.write_text("\n".join([*head(options), *lines, "", *sentences, ""]))
    print(f"{path.read_text()}\nwrote {path}")


if __name__ == "__main__":
    main()
