# SPDX-License-Identifier: Apache-2.0
"""What sparsity costs: a trained network with half of its weights masked, right after and after fine-tuning.

    python -m benchmarks.tasks.sparsity [--nets resnet vit] [--patterns 2:4 cin32cout64] [--seeds 3] [--report FOLDER]

Ours beside torch.ao's sparsifier and a plain magnitude mask. Kept under build/tasks/: stop it, run it, it goes on.
"""

import argparse
import datetime
import statistics
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fxslim
from benchmarks.tasks.contest import Contest, Settings
from benchmarks.tasks.glyphs import CLASSES
from benchmarks.tasks.masked_rows import RIVALS, masked_layers, ours, share_of_zeros
from benchmarks.tasks.paired_intervals import paired_interval
from benchmarks.tasks.remembering import Memory, source_digest
from benchmarks.tasks.training import reestimate_norms
from benchmarks.timing import machine

METHODS = ("magnitude", "wanda", "par", "hessian", "magnitude+ste")
REFERENCE = "plain mask"


@dataclass(frozen=True, kw_only=True)
class MaskedScore:
    """Accuracies in percent, and the share of the chosen weights that is 0."""

    zeros: float
    right_after: float
    fine_tuned: float


def score(contest: Contest, name: str, pattern: str, net: str, seed: int) -> MaskedScore:
    """One contestant on one training; batch norms see the same images again before its accuracy right after."""
    base = contest.base(net, seed)
    layers = masked_layers(base, pattern)
    if name in RIVALS:
        model = RIVALS[name](pattern, base, contest.batches, layers)
    else:
        model = ours(name, pattern, base, contest.batches, layers)
    zeros = share_of_zeros(model, layers)
    model = reestimate_norms(model, contest.batches)
    return MaskedScore(
        zeros=zeros, right_after=contest.accuracy(model), fine_tuned=contest.fine_tuned(model, net, seed)
    )


def scores_of(contest: Contest, name: str, pattern: str, net: str, seeds: int) -> list[MaskedScore] | str:
    """One for each seed, or why there are none."""
    found = []
    for seed in range(seeds):
        start = time.perf_counter()
        try:
            found.append(score(contest, name, pattern, net, seed))
        except fxslim.FxslimError as error:
            return str(error)
        print(f"{net} {pattern} seed {seed} {name}: {found[-1]} ({time.perf_counter() - start:.0f} s)", flush=True)
    return found


def row(pattern: str, name: str, scores: list[MaskedScore] | str, reference: list[MaskedScore]) -> str:
    if isinstance(scores, str):
        return f"| {pattern} | {name} | not run: {scores} | | | | |"
    cells = [pattern, name, f"{statistics.fmean(one.zeros for one in scores):.1%}"]
    for stage in ("right_after", "fine_tuned"):
        values = [getattr(one, stage) for one in scores]
        difference = paired_interval(values, [getattr(one, stage) for one in reference])
        cells += [f"{statistics.fmean(values):.2f}", "" if scores is reference else str(difference)]
    return "| " + " | ".join(cells) + " |"


def section(contest: Contest, net: str, patterns: list[str], methods: list[str], seeds: int) -> list[str]:
    whole = [contest.accuracy(contest.base(net, seed)) for seed in range(seeds)]
    longer = [contest.fine_tuned(_plain_copy(contest, net, seed), net, seed) for seed in range(seeds)]
    print(f"{net}: dense {whole}, trained on {longer}", flush=True)
    lines = [
        f"## {net}: dense {statistics.fmean(whole):.2f} %, with the same fine-tuning {statistics.fmean(longer):.2f} %",
        "", f"| pattern | mask | zeros | right after | - {REFERENCE} | fine-tuned | - {REFERENCE} |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for pattern in patterns:
        scores = {name: scores_of(contest, name, pattern, net, seeds) for name in (REFERENCE, "torch.ao", *methods)}
        reference = scores[REFERENCE]
        assert not isinstance(reference, str)
        lines += [row(pattern, name, found, reference) for name, found in scores.items()]
    return [*lines, ""]


def _plain_copy(contest: Contest, net: str, seed: int) -> nn.Module:
    return contest.base(net, seed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "cin32cout64"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=0.5, help="of fine-tuning")
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    return parser.parse_args()


def head(options: argparse.Namespace) -> list[str]:
    given = {name: value for name, value in vars(options).items() if name != "report"}
    words = [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in given.items()
    ]
    text = f"""Letters in {len(CLASSES)} classes, 3x32x32, 60,000 training and 20,000 test images, generated
    (`benchmarks/tasks/`). Test accuracy in percent, mean of {options.seeds} trainings; differences from a plain
    magnitude mask (torch.nn.utils.prune) are paired by training, with 95 % intervals (Student's t); a star marks
    those that exclude 0. All convolutions (in a transformer all linear layers) that can follow the pattern are
    masked, but not the first layer and the last, the same for all. Half of the blocks go: those at the edges are
    smaller, so zeros may be fewer, and not the same for all.
    2,000 training images for methods that look at data, and for the statistics of batch norms,
    which all contestants estimate anew. Fine-tuned: {options.epochs:g} epochs with the mask on; `+ste`: the mask
    follows the weights, every 50 batches, by straight-through gradients."""
    return [
        f"# What half of the weights at 0 costs, {datetime.date.today()}", "", machine(), "",
        *textwrap.wrap(" ".join(text.split()), 118), "",
        f"Reproduce: `python -m benchmarks.tasks.sparsity {' '.join(words)}`.", "",
    ]  # fmt: skip


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    memory = Memory(Path("build/tasks") / source_digest())
    contest = Contest(memory, Settings(epochs=options.epochs), 60_000, 20_000)
    lines: list[str] = []
    for net in options.nets:
        lines += section(contest, net, options.patterns, options.methods, options.seeds)
        print("\n".join(lines), flush=True)
    path = options.report / f"{datetime.date.today()}-sparsity.md"
    options.report.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*head(options), *lines]))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
