# SPDX-License-Identifier: Apache-2.0
"""Timing on a shared, noisy machine: contestants take turns in one process; medians of ratios."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contestants: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call of each contestant, one call each per round (CPU time on the CPU)."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(rounds + 2):
        for name, call in contestants.items():
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            if round_number >= 2:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: list[float], unit: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, unit, strict=True))


def machine() -> str:
    """Hardware and versions, for the head of a report."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    capability = torch.backends.cpu.get_cpu_capability()
    gpu = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: the CUDA kernels were compiled, not run"
    )
    return (
        f"{model} ({torch.get_num_threads()} threads, {capability}); {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {platform.system()} {platform.release()}"
    )
