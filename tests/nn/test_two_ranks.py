# SPDX-License-Identifier: Apache-2.0
"""Masks under DistributedDataParallel: equal on both ranks after every step, though they see other data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fxslim.patterns import check

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, torch.Tensor]]]]:
    """What each of two processes saw. They meet in a file and talk over the loopback device."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    script, processes = ROOT / "tests/nn/two_ranks.py", []
    try:
        for rank in range(2):
            with (folder / f"{rank}.txt").open("w") as log:
                command = [sys.executable, str(script), str(rank), str(folder / "meeting"), str(folder / f"{rank}.pt")]
                processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "".join((folder / f"{rank}.txt").read_text() for rank in range(2))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", ["0.0 zero", "0.0 sr_ste", "2.0 zero", "2.0 sr_ste", "two forwards"])
def test_masks_are_equal_on_both_ranks(ranks, case: str) -> None:
    changed = False
    before = None
    for one, other in zip(ranks[0][case], ranks[1][case], strict=True):
        for layer in ("0", "4"):
            mask, weight = one[f"{layer}.weight_mask"], one[f"{layer}.weight"]
            assert torch.equal(mask, other[f"{layer}.weight_mask"])
            assert torch.equal(weight, other[f"{layer}.weight"])
            assert check(mask, "2:4").ok
        assert not torch.equal(one["1.running_mean"], other["1.running_mean"]), "the ranks saw the same data"
        changed = changed or (before is not None and not torch.equal(before, one["4.weight_mask"]))
        before = one["4.weight_mask"]
    # Without their gradient masked weights stand still: only sr_ste and regrow bring some back.
    assert changed or case == "0.0 zero"
