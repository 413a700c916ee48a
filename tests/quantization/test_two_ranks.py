# SPDX-License-Identifier: Apache-2.0
"""Quantized training under DistributedDataParallel: ranks see other data, and hold the same clips, scales, weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import UnsupportedLayerError
from fxslim.nn import LinearQAT, MultiheadAttentionQAT
from tests.quantization.two_ranks import CASES, STEPS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, torch.Tensor]]]]:
    """What each of two processes saw. They meet in a file and talk over the loopback device."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    script, processes = ROOT / "tests/quantization/two_ranks.py", []
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


# What was observed on a rank alone, before ranges are averaged, is its own; so are batch norm's statistics.
OWN = ("calibration_", "running_", "num_batches_tracked")


@pytest.mark.parametrize("case", [*CASES, "convolutions ulq, calibrated"])
def test_ranks_agree_after_every_step(ranks, case: str) -> None:
    one, other = (found[case] for found in ranks)
    assert len(one) == STEPS
    for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if not any(part in name for part in OWN):
                # The grid of the last forward is made from the same ranges.
                assert torch.equal(value, theirs[name]), f"{name} after step {number + 1}"
    trained = [n for n in one[0] if n.endswith((".clip_max", ".range_max", "quantizer.scale"))]
    assert trained
    # Gradients of some clips are lost in rounding; those of keys and values are 0 in self-attention.
    moved = [name for name in trained if not torch.equal(one[-1][name], one[5][name])]
    assert len(moved) > len(trained) / 3
    seen = [name for name in one[0] if any(part in name for part in OWN[1:2])]
    assert any(not torch.equal(one[-1][name], other[-1][name]) for name in seen) or "convolutions" not in case


def replica(layer: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them."""
    made = layer._replicate_for_data_parallel()
    made._parameters = dict(layer._parameters)
    return made


def test_data_parallel_is_refused_at_forward() -> None:
    x = torch.randn(2, 3, 4)
    layer, attention = LinearQAT(4, 4), MultiheadAttentionQAT(4, 2)
    assert layer(x).isfinite().all()
    with pytest.raises(
        UnsupportedLayerError, match=r"LinearQAT runs inside of nn\.DataParallel.*DistributedDataParallel"
    ):
        replica(layer)(x)
    with pytest.raises(UnsupportedLayerError, match=r"MultiheadAttentionQAT runs inside of nn\.DataParallel"):
        replica(attention)(x, x, x)


@pytest.mark.parametrize("change", [fxslim.plan_quantization, fxslim.prepare_qat])
def test_data_parallel_is_refused_by_name(change) -> None:
    with pytest.raises(UnsupportedLayerError, match="DataParallel"):
        change(nn.DataParallel(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedLayerError, match="DataParallel"):
        change(nn.Sequential(nn.DataParallel(nn.Linear(4, 4))))
