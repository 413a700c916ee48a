# SPDX-License-Identifier: Apache-2.0
"""What quantization costs: a trained network on integer grids, calibrated only or trained on, beside torch.ao's.

    python -m benchmarks.tasks.quantization [--net resnet] [--seeds 3] [--rows "float" ...] [--report FOLDER]

Kept under build/tasks/: stop it, run it, it goes on. `--rows` runs some rows alone, and writes no report.
"""

import argparse
import datetime
import statistics
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

import fxslim
from benchmarks.tasks.contest import RECIPES, Contest, Settings
from benchmarks.tasks.glyphs import CLASSES
from benchmarks.tasks.paired_intervals import paired_interval
from benchmarks.tasks.quantized_rows import ROWS, Row, measured
from benchmarks.tasks.remembering import Memory, code_digest, digest, model_digest, source_digest
from benchmarks.timing import machine

# The accuracies in percent of a row, one for each seed, by what is tested: simulated, and for some integer.
Scores = dict[str, list[float]]
COMPUTED_BY = (*sorted(Path(fxslim.__file__).parent.rglob("*.py")), *sorted(Path(__file__).parent.glob("*_rows.py")))


def score(contest: Contest, row: Row, net: str, seed: int, code: str) -> dict[str, float]:
    """One contestant on one training; those that train see the same images in the same order."""
    base = contest.base(net, seed)
    recipe = replace(RECIPES[net], epochs=contest.settings.epochs, rate=RECIPES[net].rate / 4)
    counts = len(contest.pictures.labels), len(contest.unseen.labels), contest.settings.calibration
    key = digest("quantized", row.group, row.name, code, seed, recipe, model_digest(base), counts)
    return contest.memory.numbers(key, lambda: measured(row, base, contest, recipe, seed))


def scores_of(contest: Contest, row: Row, net: str, seeds: int, code: str) -> Scores:
    found: Scores = {}
    for seed in range(seeds):
        start = time.perf_counter()
        for name, value in score(contest, row, net, seed, code).items():
            found.setdefault(name, []).append(value)
        shown = ", ".join(f"{name} {values[-1]:.2f}" for name, values in found.items())
        print(f"{net} seed {seed} {row.group}: {row.name}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    return found


def best_peers(scores: dict[Row, Scores]) -> dict[str, Row]:
    """{group: torch.ao's row of the higher mean}."""
    best: dict[str, Row] = {}
    for row, found in scores.items():
        mean = statistics.fmean(found["simulated"])
        if row.is_peer and (row.group not in best or mean > statistics.fmean(scores[best[row.group]]["simulated"])):
            best[row.group] = row
    return best


def line(row: Row, scores: dict[Row, Scores]) -> str:
    """One of the table: each seed, the mean, differences from float and from torch.ao's best of the group."""
    plain, tuned = (scores[one]["simulated"] for one in ROWS[:2])
    values, peer = scores[row]["simulated"], best_peers(scores).get(row.group)
    cells = [row.group, row.name, " ".join(f"{value:.2f}" for value in values), f"{statistics.fmean(values):.2f}"]
    cells += ["" if values is other else str(paired_interval(values, other)) for other in (plain, tuned)]
    compared = peer is not None and not row.is_peer
    cells.append(str(paired_interval(values, scores[peer]["simulated"])) if compared and peer else "")
    integer = scores[row].get("integer")
    cells.append(f"{statistics.fmean(integer):.2f}" if integer else "")
    return "| " + " | ".join(cells) + " |"


def table(scores: dict[Row, Scores]) -> list[str]:
    return [
        "| | | each training | mean | - float | - float, fine-tuned | - torch.ao | integer model |",
        "|---|---|---|---|---|---|---|---|",
        *(line(row, scores) for row in scores),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(RECIPES), default="resnet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=0.25, help="of fine-tuning")
    parser.add_argument("--rows", nargs="+", help='"GROUP: NAME" or GROUP; runs these alone')
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    return parser.parse_args()


def head(options: argparse.Namespace) -> list[str]:
    text = f"""Letters in {len(CLASSES)} classes, 3x32x32, 60,000 training and 20,000 test images, generated
    (`benchmarks/tasks/`). Test accuracy in percent of {options.seeds} trainings of the {options.net}, the mean,
    and differences paired by training, with 95 % intervals (Student's t, n = {options.seeds}); a star marks those
    that exclude 0. Trained: {options.epochs:g} epochs on the grids, all with the same optimizer, rates (up to a
    quarter of the first training's) and images in the same order, "float, fine-tuned" too. Calibrated: on 2,000
    training images, nothing trained; torch.ao by histograms. Each layer is quantized, the first and the last too;
    weights per channel, activations in 8 bits per tensor. torch.ao is graph mode (FX), convolutions fused with
    norms, fused observers; "- torch.ao": from the better of its rows of the group. All means and differences are
    of simulated grids; the last column is the mean of torch.ao's converted models, which compute in integers:
    where activations have 8 bits, additions of products may saturate on a CPU without VNNI, which is why x86's
    have 7. Its 4-bit weights are not clipped at 7 when converted, nor when calibrated: the largest become 8 or more."""
    return [
        f"# What quantization costs, {datetime.date.today()}", "", machine(), "",
        *textwrap.wrap(" ".join(text.split()), 118, break_on_hyphens=False), "",
        f"Reproduce: `python -m benchmarks.tasks.quantization --net {options.net} --seeds {options.seeds} "
        f"--epochs {options.epochs:g}`.", "",
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    memory = Memory(Path("build/tasks") / source_digest())
    contest = Contest(memory, Settings(epochs=options.epochs), 60_000, 20_000)
    code = code_digest(COMPUTED_BY)
    wanted = [row for row in ROWS if not options.rows or {row.group, f"{row.group}: {row.name}"} & set(options.rows)]
    scores = {row: scores_of(contest, row, options.net, options.seeds, code) for row in wanted}
    if options.rows:
        return
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-quantization.md"
    path.write_text("\n".join([*head(options), *table(scores), ""]))
    print(f"{path.read_text()}\nwrote {path}")


if __name__ == "__main__":
    main()
