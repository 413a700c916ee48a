# SPDX-License-Identifier: Apache-2.0
"""Times every kernel against its reference, torch's own operator and ``copy_``; writes a dated report.

python -m benchmarks.kernels.run [--rounds 15] [--report FOLDER]
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.kernels.contests import CONTESTS
from benchmarks.timing import machine, median_ratio, take_turns

# Freed memory is kept by the process, so that page faults of the allocator are not what is measured.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
COLUMNS = ("native", "reference", "torch", "topk")

NOTES = """
Outputs are allocated inside the timing; `copy_` into a preallocated tensor is 1 and is timed in the same rounds.
Contestants take turns in one process; a figure is the median over the rounds of the ratio to `copy_` in the same
round (process-CPU time with one thread, wall time otherwise). `torch` is torch.fake_quantize_per_tensor_affine,
torch.fused_moving_avg_obs_fake_quant, torch._fake_quantize_learnable_per_tensor_affine, a cast to
torch.float8_e4m3fn and back with its autograd, torch.aminmax (with torch.histc where bins are counted) and
torch.ao.pruning.WeightNormSparsifier.step. The allocator keeps freed memory (MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_), the same for all: otherwise glibc returns it after each call, and page faults cost every
contestant more than its arithmetic. `native` includes the Python call, autograd and argument checks; `reference` is
called without them. Reproduce with `make bench`.
""".strip()


def measure(device: torch.device, threads: int, rounds: int) -> list[str]:
    torch.set_num_threads(threads)
    heading = f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"
    rows = [
        f"### {heading}",
        "",
        "| task | copy_ ms | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for make in CONTESTS:
        torch.manual_seed(0)
        seconds = take_turns(make(device), device, rounds)
        unit = seconds.pop("copy_")
        cells = [f"{median_ratio(seconds[name], unit):.2f}" if name in seconds else "" for name in COLUMNS]
        rows.append(f"| {make.__doc__} | {statistics.median(unit) * 1e3:.2f} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return [*rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", type=Path, default=Path(__file__).parents[1] / "reports")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        environment = {**os.environ, **KEEP_MEMORY}
        sys.exit(
            subprocess.run([sys.executable, "-m", "benchmarks.kernels.run", *sys.argv[1:]], env=environment).returncode
        )
    head = machine()
    settings = [(torch.device("cpu"), 1), (torch.device("cpu"), os.cpu_count() or 1)]
    if torch.cuda.is_available():
        settings.append((torch.device("cuda"), 1))
    lines = [f"# Kernels, {datetime.date.today()}", "", head, "", NOTES, ""]
    for device, threads in settings:
        lines += measure(device, threads, options.rounds)
    if not torch.cuda.is_available():
        lines += ["### cuda", "", "not run: no GPU on this machine. The CUDA kernels compile and link.", ""]
    options.report.mkdir(parents=True, exist_ok=True)
    path = options.report / f"{datetime.date.today()}-kernels.md"
    path.write_text("\n".join(lines))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
