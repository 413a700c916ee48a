# SPDX-License-Identifier: Apache-2.0
"""Quantized training under DistributedDataParallel: ranks see other data, and hold the same clips, scales, weights."""

import pytest
import torch
from torch import nn

import fxslim
from fxslim.errors import UnsupportedLayerError
from fxslim.nn import LinearQAT, MultiheadAttentionQAT
from tests.process_pairs import run_two_ranks
from tests.quantization.two_ranks import CASES, STEPS

SECONDS = 300


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, torch.Tensor]]]]:
    """What each of two processes saw."""
    return run_two_ranks("tests/quantization/two_ranks.py", tmp_path_factory.mktemp("ranks"), SECONDS)


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
