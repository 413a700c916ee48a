# SPDX-License-Identifier: Apache-2.0
"""Runs a script as two processes of one distributed run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run_two_ranks(script: str, folder: Path, seconds: float) -> list[Any]:
    """What each of two processes saved. They meet in a file and talk over the loopback device."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    path, processes = ROOT / script, []
    try:
        for rank in range(2):
            with (folder / f"{rank}.txt").open("w") as log:
                command = [sys.executable, str(path), str(rank), str(folder / "meeting"), str(folder / f"{rank}.pt")]
                processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "".join((folder / f"{rank}.txt").read_text() for rank in range(2))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
