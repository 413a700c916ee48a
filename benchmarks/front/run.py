# SPDX-License-Identifier: Apache-2.0
"""The front: accuracy, latency and size of all combinations, and of other tools' recipes, on one task.

    python -m benchmarks.front.run [--nets resnet vit] [--seeds 3] [--jobs 2] [--report FOLDER]

Everything is kept under build/: stop it anywhere, run it again, and it goes on; only trainings that were running are
lost. `--cells NAME...` makes some cells alone, and writes no report.
"""

import argparse
import datetime
import fnmatch
import logging
import textwrap
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import onnxruntime
import torch

import fxslim
from benchmarks.front.cells import CELLS, FLOAT, ROWS, Cell
from benchmarks.front.compressed_models import REDUCED
from benchmarks.front.front_picture import picture
from benchmarks.front.front_report import section, summary
from benchmarks.front.latencies import Latency, latencies
from benchmarks.front.made_files import Made, made_by
from benchmarks.front.places import NETS, STEPS, Place
from benchmarks.front.standings import Standing
from benchmarks.front.workers import Workers
from benchmarks.tasks.contest import Contest, Settings
from benchmarks.tasks.remembering import Memory, code_digest, digest, source_digest
from benchmarks.timing import machine

HERE = Path(__file__).parent
COMPUTED_BY = (
    *sorted(Path(fxslim.__file__).parent.rglob("*.py")),
    *(HERE / f"{name}.py" for name in ("cells", "compressed_models", "made_files", "peer_models", "places")),
    *(
        HERE.parent / "tasks" / f"{name}.py"
        for name in ("candidates", "contest", "masked_rows", "torch_ao_rows", "torch_pruning_rows")
    ),
)
IMAGES = 60_000, 10_000
# Network, seed, steps, folder; and by network, seed and cell what came of it.
Task = tuple[str, int, int, Path]
Results = dict[tuple[str, int, str], list[Made]]


@lru_cache(maxsize=1)
def _contest() -> Contest:
    """One for each process: making the images takes a while."""
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    return Contest(Memory(Path("build/tasks") / source_digest()), Settings(), *IMAGES)


def _place(task: Task) -> Place:
    net, seed, steps, folder = task
    return Place(_contest(), net, seed, folder / f"{net}-{seed}", steps)


def _act(name: str, task: Task) -> float | list[Made]:
    """What a process does: trains the network (without a name), or makes a cell of it."""
    place = _place(task)
    if not name:
        # What all learn from is made here, once.
        _ = place.logits
        return place.contest.accuracy(place.base)
    return made_by(next(cell for cell in CELLS if cell.name == name), place)


def make_all(tasks: list[Task], cells: list[Cell], jobs: int) -> Results:
    """All files: networks first, then each one's cells, ``jobs`` at a time."""
    found: Results = {}
    workers = Workers(_act, jobs)
    for task in tasks:
        workers.put("", task)
    for (name, task), answer in workers.answers():
        net, seed, _, _ = task
        if name:
            found[net, seed, name] = answer if isinstance(answer, list) else _failed(name, answer)
        elif isinstance(answer, Exception):
            raise answer
        else:
            print(f"{net} {seed}: trained, {answer:.2f} %", flush=True)
            for cell in cells:
                workers.put(cell.name, task)
    return found


def _failed(name: str, error: Exception) -> list[Made]:
    cell = next(cell for cell in CELLS if cell.name == name)
    print(f"{name}: {error}", flush=True)
    return [Made(row=row.name, error=f"{type(error).__name__}: {error}") for row in cell.rows]


def standings_of(net: str, tasks: list[Task], results: Results, rounds: int) -> list[Standing]:
    """Of one network: times its files, too."""
    found: list[tuple[dict[str, Made], dict[str, list[Latency]]]] = []
    for task in tasks:
        _, seed, _, folder = task
        place = folder / f"{net}-{seed}"
        rows = {one.row: one for cell in CELLS for one in results[net, seed, cell.name]}
        files = {name: place / one.file for name, one in rows.items() if one.file}
        found.append((rows, latencies(files, NETS[net], FLOAT, place / "latencies.json", rounds)))
    return list(_standings(found))


def _standings(found: list[tuple[dict[str, Made], dict[str, list[Latency]]]]) -> Iterator[Standing]:
    for number, row in enumerate(ROWS, 1):
        rows = [rows[row.name] for rows, _ in found]
        error = next((one.error for one in rows if one.error), "")
        if error:
            yield Standing(number=number, name=row.name, by=row.by, error=error)
            continue
        yield Standing(
            number=number, name=row.name, by=row.by, accuracies=tuple(one.accuracy for one in rows),
            latencies=tuple(tuple(timed[row.name]) for _, timed in found),
            bytes=sum(one.bytes for one in rows) / len(rows),
        )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="the fixed budget of each training")
    parser.add_argument("--jobs", type=int, default=2, help="processes that train, one thread each")
    parser.add_argument("--rounds", type=int, default=100, help="of timing one image")
    parser.add_argument("--cells", nargs="+", help="names or globs: makes these alone")
    parser.add_argument("--report", type=Path, default=HERE.parent / "reports")
    return parser.parse_args()


def head(options: argparse.Namespace, seconds: float) -> list[str]:
    text = f"""Letters in 16 classes, 3x32x32, {IMAGES[0]:,} training and {IMAGES[1]:,} test images, generated
    (`benchmarks/tasks/`). Networks are trained, then compressed, then trained on for as many multiplications as
    {options.steps} steps of 128 images take the whole network (a pruned one makes more steps), with the same optimizer,
    highest rate and order of images; rows that end in "int8" or
    "quantize_static", and those of the float network itself, are calibrated on 2,000 training images afterwards.
    Accuracy in percent, of the files as this machine runs them; {options.seeds} trainings, differences paired by
    training, with 95 % intervals (Student's t); a star marks those that exclude 0."""
    timing = """Latency: one thread, process-CPU time, all files of a training take turns in one process; medians, and
    medians of ratios to the float file's in the same round. ONNX Runtime runs all files but those of Cin32Cout64
    (torch, layers of `fxslim.convert`) and of torch.ao (torch, its x86 kernels), which exports no integers."""
    if REDUCED:
        timing += " Without VNNI all int8 weights have 7 bits here: with 8, sums of products saturate."
    command = f"python -m benchmarks.front.run --nets {' '.join(options.nets)} --seeds {options.seeds}"
    how = f"""Reproduce: `make pareto` (`{command} --steps {options.steps}`). All but the first trainings of networks
    took {seconds / 60 / options.jobs:.0f} minutes of {options.jobs} processes, one thread each."""
    how = " ".join(how.split())
    paragraphs = [textwrap.wrap(" ".join(part.split()), 118, break_on_hyphens=False) for part in (text, timing)]
    return [
        f"# The front: accuracy, latency and size, {datetime.date.today()}", "",
        f"{machine()}, onnxruntime {onnxruntime.__version__}", "", *paragraphs[0], "", *paragraphs[1], "",
        *textwrap.wrap(how, 118, break_on_hyphens=False), "",
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    key = digest(code_digest(COMPUTED_BY), source_digest(), torch.__version__, onnxruntime.__version__, options.steps)
    folder = Path("build/front") / key
    cells = [c for c in CELLS if not options.cells or any(fnmatch.fnmatch(c.name, glob) for glob in options.cells)]
    tasks = {net: [(net, seed, options.steps, folder) for seed in range(options.seeds)] for net in options.nets}
    results = make_all([task for some in tasks.values() for task in some], cells, options.jobs)
    if options.cells:
        return
    nets = {net: standings_of(net, some, results, options.rounds) for net, some in tasks.items()}
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-front.md"
    path.with_suffix(".svg").write_text(picture(nets))
    seconds = sum(one.seconds for made in results.values() for one in made)
    sections = [line for net, standings in nets.items() for line in section(net, standings)]
    shown = f"![accuracy over latency and over size]({path.with_suffix('.svg').name})"
    path.write_text("\n".join([*head(options, seconds), *summary(nets), shown, "", *sections]))
    print(f"{path.read_text()}\nwrote {path}")


if __name__ == "__main__":
    main()
