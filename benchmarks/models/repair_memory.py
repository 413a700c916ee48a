# SPDX-License-Identifier: Apache-2.0
"""Peak memory of least squares on layers that read 4,096 channels, each in a process of its own.

    python -m benchmarks.models.repair_memory [--report FOLDER]

Resident memory (VmHWM) above what the process held with model and data, for apply alone and with the repair.
"""

import argparse
import datetime
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.models.peak_memory import resident
from benchmarks.timing import machine

WIDTH = 4096


def linear() -> tuple[nn.Module, Tensor]:
    """Linear(4096, 4096)."""
    return nn.Sequential(nn.Linear(64, WIDTH), nn.Softplus(), nn.Linear(WIDTH, WIDTH)), torch.randn(2000, 64)


def convolution() -> tuple[nn.Module, Tensor]:
    """Conv2d(4096, 16, 3)."""
    model = nn.Sequential(nn.Conv2d(16, WIDTH, 1), nn.Softplus(), nn.Conv2d(WIDTH, 16, 3, padding=1))
    return model, torch.randn(16, 16, 8, 8)


LAYERS = {"linear": linear, "convolution": convolution}


def measure(kind: str, repair: str) -> tuple[int, float]:
    """Bytes at the peak of apply above those before it, and its seconds."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = LAYERS[kind]()
    model.eval()
    data = list(x.split(max(1, len(x) // 8)))
    settings: dict[str, Any] = {} if repair == "none" else {"repair": repair, "data": data}
    plan = fxslim.plan_pruning(model, data[0], target="channels", ratio=0.5, **settings)
    before, start = resident("VmRSS"), time.perf_counter()
    # The peak so far counts from here.
    Path("/proc/self/clear_refs").write_text("5")
    plan.apply(model)
    return resident("VmHWM") - before, time.perf_counter() - start


def _in_own_process(kind: str, repair: str) -> tuple[float, float]:
    """MiB and seconds."""
    command = [sys.executable, "-m", "benchmarks.models.repair_memory", "--one", kind, repair]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = done.stdout.split()[-2:]
    return int(peak) / 2**20, float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.one:
        print(*measure(*options.one))
        return
    rows = []
    for kind, make in LAYERS.items():
        (plain, _), (mended, seconds) = (_in_own_process(kind, repair) for repair in ("none", "least_squares"))
        by_entry = 8 * (WIDTH * (9 if kind == "convolution" else 1)) ** 2 / 2**20
        name = str(make.__doc__).rstrip(".")
        rows.append(
            f"| {name} | {plain:,.0f} | {mended:,.0f} | {mended - plain:,.0f} | {by_entry:,.0f} | {seconds:.0f} |"
        )
        print(rows[-1], flush=True)
    lines = [
        f"# Memory of least squares at {WIDTH:,} channels, {datetime.date.today()}", "", machine(), "",
        "MiB at the peak of `apply` above what the process held before, half of the channels removed; by entry: what",
        "the sums of products of all entries of a filter would take alone.", "",
        "Reproduce: `python -m benchmarks.models.repair_memory`.", "",
        "| layer that is refitted | apply | with least squares | more | by entry | seconds |",
        "|---|---|---|---|---|---|",
        *rows, "",
    ]  # fmt: skip
    path = options.report / f"{datetime.date.today()}-repair-memory.md"
    path.write_text("\n".join(lines))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
