# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of trace, plan and apply as models grow: ResNets up to 1,000 layers, DenseNets deeper and wider.

    python -m benchmarks.models.scaling [--only GLOB] [--report FOLDER]

The largest and the smallest of a family are compared by seconds per recorded operator, which stay the same where
the work is linear. The model's own forwards are part of the figures, and are shown beside.
"""

import argparse
import datetime
import fnmatch
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet
from torchvision.models.resnet import Bottleneck

import fxslim
from benchmarks.timing import machine
from fxslim.graph.channel_graph import ChannelGraph

X = torch.randn(1, 3, 32, 32)


def resnet(depth: int) -> nn.Module:
    """A bottleneck ResNet of about this many layers, an eighth as wide as usual."""
    blocks = (depth - 2) // 12
    return ResNet(Bottleneck, [blocks] * 4, width_per_group=8)


def densenet(layers: int, growth: int) -> nn.Module:
    return DenseNet(growth, (layers // 4,) * 4, 2 * growth, bn_size=2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{f"resnet {d} layers": lambda d=d: resnet(d) for d in (62, 122, 242, 506, 1002)},
    **{f"densenet {n} x growth 8": lambda n=n: densenet(n, 8) for n in (16, 32, 64, 128)},
    **{f"densenet 32 x growth {g}": lambda g=g: densenet(32, g) for g in (8, 16, 32, 64)},
}


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The least CPU time of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.eval()(x)


def operators(graph: ChannelGraph) -> int:
    return sum(len(recording.nodes) for recording in graph.arranger.recordings)


def row(name: str) -> tuple[float, str]:
    """Microseconds per operator, and a line of the report."""
    model = MODELS[name]()
    nodes = operators(fxslim.trace(model, X))
    spent = {
        "forward": seconds(lambda: forward(model, X)),
        "trace": seconds(lambda: fxslim.trace(model, X)),
        "plan": seconds(lambda: fxslim.plan_pruning(model, X, ratio=0.5)),
    }
    plan = fxslim.plan_pruning(model, X, ratio=0.5)
    start = time.process_time()
    plan.apply(model)
    spent["apply"] = time.process_time() - start
    each = 1e6 * (spent["plan"] + spent["apply"]) / nodes
    cells = [name, f"{nodes:,}", *(f"{value:.2f}" for value in spent.values()), f"{each:.0f}"]
    return each, "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fxslim.prune(densenet(16, 8), X)
    lines, families = [], dict[str, list[float]]()
    for name in MODELS:
        if fnmatch.fnmatch(name, options.only):
            each, text = row(name)
            families.setdefault(name.split()[0] + (" wider" if " 32 x" in name else " deeper"), []).append(each)
            lines.append(text)
            print(text, flush=True)
    growth = [f"{family}: {found[-1] / found[0]:.2f}" for family, found in families.items()]
    head = [
        f"# Time as models grow, {datetime.date.today()}", "", machine(), "",
        "CPU seconds at 1x3x32x32, the least of three (apply: once). `plan` includes the trace, `apply` a trial",
        "forward; us per operator is plan and apply over the operators recorded. Largest over smallest of a family: "
        + ", ".join(growth) + ".", "Reproduce: `python -m benchmarks.models.scaling`.", "",
        "| model | operators | forward | trace | plan | apply | us per operator |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    path = options.report / f"{datetime.date.today()}-scaling.md"
    path.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
