# SPDX-License-Identifier: Apache-2.0
"""What each kind of repair leaves of a small trained ResNet's accuracy, on digits that it has not seen."""

import argparse
import copy
import datetime
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.timing import machine
from fxslim.pruning.repair.settings import Repair

REPAIRS: dict[str, Any] = {
    "none": None,
    "bn": "bn",
    "least squares, original": Repair(steps=("least_squares",), inputs="original"),
    "least squares, original, bn": Repair(steps=("least_squares", "bn"), inputs="original"),
    "least squares": "least_squares",
    "least squares, bn": ("least_squares", "bn"),
    "least squares by channel": Repair(steps=("least_squares",), limit_bytes=30_000),
}


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.second, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        shortcut = [nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)]
        self.shortcut = nn.Sequential(*shortcut if (before, stride) != (after, 1) else [])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (y + self.shortcut(x)).relu()


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images of scikit-learn, shuffled, and their labels."""
    from sklearn.datasets import load_digits

    read = load_digits()
    order = torch.randperm(len(read.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(read.images).float().unsqueeze(1)[order] / 8 - 1, torch.tensor(read.target)[order]


def trained(images: Tensor, labels: Tensor) -> nn.Module:
    """Eight epochs."""
    torch.manual_seed(0)
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 48, 2), Block(48, 48, 1)]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(8):
        for some in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
    return model.eval()


def row(model: nn.Module, images: Tensor, labels: Tensor, num: int, ratio: float, name: str) -> str:
    """Accuracy, distance of the outputs from the original's, and seconds that ``apply`` takes."""
    data = list(images[:num].split(50))
    pruned = copy.deepcopy(model)
    plan = fxslim.plan_pruning(pruned, images[:2], ratio=ratio, data=data, repair=REPAIRS[name])
    start = time.perf_counter()
    plan.apply(pruned)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        wanted, found = model(images[1200:]), pruned(images[1200:])
    accuracy = float((found.argmax(1) == labels[1200:]).float().mean())
    error = (found - wanted).norm() / wanted.norm()
    return f"| {num} | {ratio:.0%} | {name} | {accuracy:.1%} | {error:.3f} | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Small data is meant here: what falls back to channels is told by the figures.
    logging.disable(logging.WARNING)
    images, labels = digits()
    model = trained(images[:1200], labels[:1200])
    with torch.no_grad():
        whole = float((model(images[1200:]).argmax(1) == labels[1200:]).float().mean())
    rows = []
    for num, ratio in ((400, 0.3), (400, 0.5), (400, 0.7), (100, 0.7), (50, 0.7)):
        for name in REPAIRS:
            rows.append(row(model, images, labels, num, ratio, name))
            print(rows[-1], flush=True)
    head = [
        f"# Repair without training, {datetime.date.today()}", "", machine(), "",
        f"A ResNet of 13 convolutions, trained on 1,200 digits of 8x8; {whole:.1%} of 597 others are right. Pruned by",
        "l2, a fraction of its macs; repaired from so many of the 1,200, without labels. Error: the distance of the",
        "outputs from the original's, relative, on the 597. Seconds: of `apply`, on a busy machine. Reproduce:",
        "`python -m benchmarks.models.repair`.",
        "", "| images | removed | repair | right | error | seconds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    path = options.report / f"{datetime.date.today()}-repair.md"
    path.write_text("\n".join([*head, *rows, ""]))


if __name__ == "__main__":
    main()
