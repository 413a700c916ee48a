# SPDX-License-Identifier: Apache-2.0
"""Peak memory of trace, plan and apply beside that of one forward, each in a process of its own.

    python -m benchmarks.models.peak_memory [--only GLOB] [--report FOLDER]

Resident memory of the process (VmHWM) above what it held before the model was built, after a small model went the
same way, so that imports do not count. The forward is without gradients, in eval mode.
"""

import argparse
import datetime
import fnmatch
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model

import fxslim
from benchmarks.timing import machine

MODELS = {
    "resnet50": (1, 224), "resnet152": (1, 224), "densenet201": (1, 224), "convnext_base": (1, 224), "vgg16": (1, 224),
    "efficientnet_v2_m": (1, 224), "mobilenet_v3_large": (1, 224), "regnet_y_16gf": (1, 224), "inception_v3": (1, 299),
    "vit_b_16": (1, 224), "fcn_resnet50": (1, 520), "resnet18": (16, 224), "mobilenet_v2": (16, 224),
}  # fmt: skip
LIMIT = 1.5


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.eval()(x)


def trace(model: nn.Module, x: Tensor) -> None:
    fxslim.trace(model, x)


def prune(model: nn.Module, x: Tensor) -> None:
    fxslim.plan_pruning(model, x, ratio=0.5).apply(model)


WORK = {"forward": forward, "trace": trace, "prune": prune}


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the peak) of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def measure(name: str, work: str) -> int:
    """Bytes at the peak above those before the model was built."""
    batch, size = MODELS[name]
    WORK[work](get_model("resnet18", weights=None), torch.randn(1, 3, 64, 64))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    settings = {"weights_backbone": None} if name.startswith("fcn") else {}
    WORK[work](get_model(name, weights=None, **settings), torch.randn(batch, 3, size, size))
    return resident("VmHWM") - before


def in_own_process(name: str, work: str) -> int:
    command = [sys.executable, "-m", "benchmarks.models.peak_memory", "--measure", name, work]
    # Large blocks go back to the system at once, so that resident memory is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def row(name: str) -> tuple[list[float], str]:
    """Peaks over that of the forward, and a line of the report."""
    peaks = {work: in_own_process(name, work) for work in WORK}
    batch, size = MODELS[name]
    ratios = [peaks[work] / peaks["forward"] for work in ("trace", "prune")]
    cells = [f"{name} {batch}x3x{size}x{size}", *(f"{peak / 2**20:.0f}" for peak in peaks.values())]
    return ratios, "| " + " | ".join([*cells, *(f"{ratio:.2f}" for ratio in ratios)]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "WORK"))
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.measure:
        print(measure(*options.measure))
        return
    results = []
    for name in MODELS:
        if fnmatch.fnmatch(name, options.only):
            results.append(row(name))
            print(results[-1][1], flush=True)
    within = [sum(ratios[i] <= LIMIT for ratios, _ in results) for i in range(2)]
    head = [
        f"# Peak memory beside one forward, {datetime.date.today()}", "", machine(), "",
        f"{within[0]} of {len(results)} traces and {within[1]} of {len(results)} prunings stay within {LIMIT} times",
        "one forward. MiB of resident memory at the peak, above what the process held before the model was built; each",
        "figure from a process of its own. `prune` is trace, plan (l2, half of the macs) and apply with its trial",
        "forward, until which all entries are kept, so that a failure can be taken back. Reproduce:",
        "`python -m benchmarks.models.peak_memory`.", "",
        "| model and input | forward | trace | prune | trace / forward | prune / forward |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-peak-memory.md"
    path.write_text("\n".join([*head, *(text for _, text in results), ""]))


if __name__ == "__main__":
    main()
