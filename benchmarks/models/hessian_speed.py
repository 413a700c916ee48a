# SPDX-License-Identifier: Apache-2.0
"""Pruning by the Hessian beside the factors and products that the published method needs, and beside magnitude."""

import argparse
import datetime
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import machine, median_ratio, take_turns
from fxslim.patterns import NM, Block, Unstructured
from fxslim.sparsity.second_order import Patterns, prune_by_hessian

# And sweeps.
CASES: list[tuple[Patterns, int]] = [
    (NM(2, 4), 0), (NM(2, 4), 1), (NM(4, 8), 0), (Unstructured(0.5), 0), (Unstructured(0.5), 1),
    (Unstructured(0.5, per_output=True), 0), (Block(ratio=0.5), 0),
]  # fmt: skip
BLOCK_SIZE = 128


def correlated(size: int) -> tuple[Tensor, Tensor]:
    """A weight, and products of inputs as behind a ReLU: of uneven size, and a few directions carry most."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, size + 1).pow(-0.5)
    mix = spectrum.unsqueeze(1) * torch.randn(size, size, generator=generator)
    x = (torch.randn(2 * size, size, generator=generator) @ mix).relu_()
    return torch.randn(size, size, generator=generator), x.t() @ x


def needed(weight: Tensor, gram: Tensor) -> None:
    """A Cholesky factor, the inverse by it, the inverse's factor, and the product of each block's errors."""
    damped = gram.clone()
    damped.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest = weight.clone()
    for start in range(0, len(gram), BLOCK_SIZE):
        stop = start + BLOCK_SIZE
        rest[:, stop:].addmm_(weight[:, start:stop], upper[start:stop, stop:], alpha=-1)


def error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """tr(dW G dW') / tr(W G W')."""
    lost = weight - new
    return float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())


def by_magnitude(weight: Tensor, pattern: Patterns) -> Tensor:
    """Without the smallest weights, or the blocks whose mean is lowest."""
    if not isinstance(pattern, Block):
        return weight * pattern.mask(weight.abs())
    parts = weight.abs().unflatten(1, (-1, pattern.cin)).unflatten(0, (-1, pattern.cout)).mean((1, 3))
    kept = parts > parts.flatten().kthvalue(pattern.num_removed(tuple(weight.shape))).values
    return weight * kept.repeat_interleave(pattern.cout, 0).repeat_interleave(pattern.cin, 1)


def rows(size: int, rounds: int) -> list[str]:
    weight, gram = correlated(size)
    contestants: dict[str, Callable[[], object]] = {"needed": lambda: needed(weight, gram)}
    results: dict[str, Tensor] = {}

    def prune(name: str, pattern: Patterns, sweeps: int) -> None:
        _, results[name] = prune_by_hessian(weight, gram, pattern, block_size=BLOCK_SIZE, sweeps=sweeps)

    for pattern, sweeps in CASES:
        name = f"{pattern} | {sweeps}"
        contestants[name] = functools.partial(prune, name, pattern, sweeps)
    seconds = take_turns(contestants, weight.device, rounds)
    lines = []
    for (pattern, _), name in zip(CASES, list(contestants)[1:], strict=True):
        ratio = median_ratio(seconds[name], seconds["needed"])
        plain = error(weight, by_magnitude(weight, pattern), gram)
        lines.append(
            f"| {size} | {name} | {min(seconds[name]):.2f} | {min(seconds['needed']):.2f} | {ratio:.2f} | "
            f"{error(weight, results[name], gram):.4f} | {plain:.4f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for size in options.sizes for line in rows(size, options.rounds)]
    head = [
        f"# Pruning by the Hessian, {datetime.date.today()}", "", machine(), "",
        "One linear layer of size x size, float32, one thread, CPU seconds of the fastest call. Needed: Cholesky,",
        "`cholesky_inverse`, Cholesky of that, and the product of each block of 128 columns with all later ones; calls",
        "take turns in one process, and times is the median over rounds of ours / needed. Error: of the outputs,",
        "tr(dW G dW') / tr(W G W'), on correlated inputs as behind a ReLU; magnitude: the same pattern, nothing else",
        "changed. Reproduce: `python -m benchmarks.models.hessian_speed`.",
        "", "| size | pattern | sweeps | s | needed s | times | error | magnitude's |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    path = options.report / f"{datetime.date.today()}-hessian.md"
    path.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
