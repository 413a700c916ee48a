# SPDX-License-Identifier: Apache-2.0
"""Ranks ways of choosing channels by what is left of a trained network: right after, repaired, fine-tuned.

    python -m benchmarks.tasks.compare [--nets resnet vit] [--seeds 3] [--criteria l2 random ...]
        [--rivals tp:taylor ...] [--report FOLDER]

Beside ours are Torch-Pruning's where `pip install torch-pruning==1.6.1` was run. Everything is kept under
build/tasks/: stop it anywhere, run it again, and it goes on.
"""

import argparse
import datetime
import importlib.util
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import fxslim
from benchmarks.tasks.contest import EXAMPLE, RECIPES, Contest, Score, Settings
from benchmarks.tasks.glyphs import CLASSES
from benchmarks.tasks.networks import NETWORKS
from benchmarks.tasks.paired_intervals import paired_interval
from benchmarks.tasks.remembering import Memory, source_digest
from benchmarks.tasks.torch_pruning_rows import RIVALS
from benchmarks.timing import machine

STAGES: tuple[tuple[str, Callable[[Score], float]], ...] = (
    ("right after", lambda score: score.right_after),
    ("repaired", lambda score: score.repaired),
    ("fine-tuned", lambda score: score.fine_tuned),
)
# The scores of a contestant, one for each seed, or why there are none.
Scores = list[Score] | str


def scores_of(contest: Contest, name: str, net: str, seeds: int) -> Scores:
    found: list[Score] = []
    for seed in range(seeds):
        start = time.perf_counter()
        try:
            score = contest.score(name, net, seed)
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"{net} seed {seed} {name}: {reason}", flush=True)
            return reason
        found.append(score)
        stages = ", ".join(f"{stage} {take(score):.2f}" for stage, take in STAGES)
        print(
            f"{net} seed {seed} {name} {score.note}: macs {score.macs:.3f}, {stages} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return found


def row(name: str, scores: Scores, baseline: list[Score]) -> str:
    """One line of the table: means over seeds and differences from the baseline with 95 % intervals."""
    if isinstance(scores, str):
        return f"| {name} | | | | | | | | not run: {scores[:140]} |"
    cells = [name, f"{statistics.fmean(score.macs for score in scores):.3f}"]
    for _, take in STAGES:
        values = [take(score) for score in scores]
        difference = paired_interval(values, [take(score) for score in baseline])
        cells += [f"{statistics.fmean(values):.2f}", "" if scores is baseline else str(difference)]
    cells.append(", ".join(sorted({score.note for score in scores} - {""})))
    return "| " + " | ".join(cells) + " |"


def table(contest: Contest, net: str, names: list[str], seeds: int) -> list[str]:
    """A section of the report; the first name is the baseline."""
    model = contest.base(net, 0)
    cost = fxslim.trace(model, EXAMPLE).cost
    whole = [contest.accuracy(contest.base(net, seed)) for seed in range(seeds)]
    print(f"{net}: unpruned {', '.join(f'{value:.2f}' for value in whole)}", flush=True)
    scores = {name: scores_of(contest, name, net, seeds) for name in names}
    baseline = scores[names[0]]
    if isinstance(baseline, str):
        raise SystemExit(f"{net}: the baseline {names[0]} can't run: {baseline}")
    return [
        f"## {net}: {cost.macs:,} macs, {cost.params:,} params, unpruned {statistics.fmean(whole):.2f} %", "",
        f"Each seed: {', '.join(f'{value:.2f}' for value in whole)}. Trained for {RECIPES[net].epochs:g} epochs.", "",
        f"| | macs kept | right after | - {names[0]} | repaired | - {names[0]} | fine-tuned | - {names[0]} | |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(name, found, baseline) for name, found in scores.items()), "",
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETWORKS), default=["resnet", "mobilenet", "vit"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--criteria",
        nargs="+",
        default=["l2", "l1", "bn", "random"],
        help="what importance= takes; +least_squares repairs too; the first is the baseline",
    )
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--heads", choices=("whole", "dim"), default="whole")
    parser.add_argument("--epochs", type=float, default=1.0, help="of fine-tuning")
    parser.add_argument("--train-images", type=int, default=60_000)
    parser.add_argument("--test-images", type=int, default=20_000)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """What makes this report, where it goes left out."""
    given = {name.replace("_", "-"): value for name, value in vars(options).items() if name != "report"}
    words = [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in given.items()
    ]
    return " ".join(["python -m benchmarks.tasks.compare", *words])


def head(options: argparse.Namespace, settings: Settings) -> list[str]:
    n, baseline = options.seeds, options.criteria[0]
    text = f"""
    Letters in {len(CLASSES)} classes, 3x32x32, {options.train_images:,} training and {options.test_images:,} test
    images, generated (`benchmarks/tasks/`). Test accuracy in percent, mean of {n} trainings. Differences from
    {baseline} are paired by training, with 95 % intervals (Student's t, n = {n}; none for n = 1); a star marks those
    that exclude 0. Repaired: batch norms re-estimated on {settings.calibration:,} training images, the same that
    criteria look at; with `+least_squares` after that repair. Fine-tuned: repaired, then {settings.epochs:g} epochs."""
    if options.rivals:
        text += """ Torch-Pruning 1.6.1 (tp): its pruning_ratio is found by bisection to within 1 % of the macs (where
        its steps are coarser: the nearest that keeps more, up to 3 %). Of its settings, global or in each layer,
        attention by entries or by heads, the best once repaired is taken for each training, and named. Its Hessian
        importance as shipped counts the last image only; `tp:hessian` is given the mean over 256 images."""
    title = f"# Which channels to remove: criteria at {1 - options.ratio:.0%} of the macs, {datetime.date.today()}"
    paragraph = textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)
    return [title, "", machine(), "", *paragraph, "", f"Reproduce: `{command(options)}`.", ""]


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = Settings(ratio=options.ratio, epochs=options.epochs, heads=options.heads)
    if options.rivals and importlib.util.find_spec("torch_pruning") is None:
        raise SystemExit("Torch-Pruning is not installed: pip install torch-pruning==1.6.1, or pass --rivals alone")
    memory = Memory(Path("build/tasks") / source_digest())
    contest = Contest(memory, settings, options.train_images, options.test_images)
    lines: list[str] = []
    for net in options.nets:
        lines += table(contest, net, [*options.criteria, *options.rivals], options.seeds)
        print("\n".join(lines), flush=True)
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-criteria.md"
    path.write_text("\n".join([*head(options, settings), *lines]))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
