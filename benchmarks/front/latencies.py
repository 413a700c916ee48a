# SPDX-License-Identifier: Apache-2.0
"""How long the files take for one image and for sixteen, on one thread, beside the float file."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.front.made_files import Run, open_file
from benchmarks.timing import median_ratio
from fxslim.plan.file_writing import write_file

SIZES = (1, 16)
# In a row, timed together after one call that brings weights back into the caches.
CALLS = 4


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds for a batch, and how many times faster than the float file in the same rounds."""

    milliseconds: float
    faster: float


def latencies(files: dict[str, Path], network: str, unit: str, kept: Path, rounds: int) -> dict[str, list[Latency]]:
    """By row, one for each of SIZES; files take turns. Kept on disk until a file or the rounds change."""
    told = {name: [path.name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files.items()}
    told["rounds"] = [str(rounds)]
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["of"] == told:
            return {name: [Latency(**one) for one in some] for name, some in found["latencies"].items()}
    runs = {name: open_file(path, network) for name, path in files.items()}
    timed = {name: [] for name in files}  # type: dict[str, list[Latency]]
    for size in SIZES:
        seconds = _take_turns(runs, torch.randn(size, 3, 32, 32), rounds if size == 1 else rounds // 2)
        for name, own in seconds.items():
            timed[name].append(
                Latency(milliseconds=1e3 * statistics.median(own), faster=median_ratio(seconds[unit], own))
            )
    text = json.dumps({"of": told, "latencies": {name: [vars(one) for one in some] for name, some in timed.items()}})
    write_file(kept, lambda temporary: temporary.write_text(text))
    return timed


def _take_turns(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one call, one figure for each round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, Callable[[], Tensor]] = {name: _call(run, images) for name, run in runs.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.process_time()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.process_time() - start) / CALLS)
    return seconds


def _call(run: Run, images: Tensor) -> Callable[[], Tensor]:
    return lambda: run(images)
