# SPDX-License-Identifier: Apache-2.0
"""The task that ranks quantization: what each contestant quantizes, what a rerun measures, what the table tells."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.tasks import contest, quantization, quantized_rows, torch_ao_rows
from benchmarks.tasks.contest import EXAMPLE, Contest, Settings
from benchmarks.tasks.glyphs import BLOCK
from benchmarks.tasks.networks import NETWORKS
from benchmarks.tasks.quantization import best_peers, line, score
from benchmarks.tasks.quantized_rows import ROWS
from benchmarks.tasks.remembering import Memory
from benchmarks.tasks.training import Pictures, Recipe
from fxslim.nn.quantizers import WeightQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")


def _network() -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS["resnet"]().eval()


def _row(group: str, name: str) -> quantized_rows.Row:
    return next(row for row in ROWS if (row.group, row.name) == (group, name))


def test_names_are_unique_and_each_quantized_group_has_a_peer() -> None:
    assert len({(row.group, row.name) for row in ROWS}) == len(ROWS)
    assert [row.name for row in ROWS[:2]] == ["float", "float, fine-tuned"]
    assert {row.group for row in ROWS if row.is_peer} == {row.group for row in ROWS} - {"float"}


@pytest.mark.parametrize("bits", [8, 4])
def test_torch_ao_computes_with_weights_of_these_bits(bits: int) -> None:
    batches = Pictures.made(64, seed=1).batches(64)
    model = torch_ao_rows.prepare_calibrated(_network(), EXAMPLE, batches, bits, reduce_range=True)
    found = torch_ao_rows.converted(model)
    whole = [m.weight().int_repr() for m in found.modules() if isinstance(m, torch.ao.nn.quantized.Conv2d)]
    assert len(whole) == 13
    # Converting rounds a weight at the end of the range, at 7.5 steps, to 8: its limits are those of 8 bits again.
    most = {8: 127, 4: 8}[bits]
    assert {int(weight.abs().max()) for weight in whole} <= {most, most + 1}
    with torch.no_grad():
        simulated, integer = (one(batches[0][0]) for one in (torch_ao_rows.simulated(model), found))
    step = float(simulated.diff().abs().unique()[1])
    assert float((simulated - integer).abs().max()) < 12 * step


def test_ours_have_4_bit_weights_where_the_group_says_so() -> None:
    batches = Pictures.made(64, seed=1).batches(64)
    for row in ROWS:
        if row.group.startswith("4-bit") and not row.is_peer:
            prepared = row.prepare(_network(), EXAMPLE, batches)
            bits = {module.config.bits for module in prepared.modules() if isinstance(module, WeightQuantizer)}
            assert bits == {4}


def test_a_rerun_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contest.RECIPES, "resnet", Recipe(epochs=0.5, rate=1e-3, batch=32))
    row = _row("INT8, trained", "torch.ao")
    one = Contest(Memory(tmp_path), Settings(calibration=64, epochs=0.125), 2 * BLOCK, BLOCK)
    first = score(one, row, "resnet", 0, "code")
    assert first.keys() == {"simulated", "integer"}
    monkeypatch.setattr(quantization, "measured", lambda *_: pytest.fail("measured again"))
    assert score(one, row, "resnet", 0, "code") == first


def test_the_best_peer_of_a_group_is_compared_with() -> None:
    values = {
        ("float", "float"): 92.0, ("float", "float, fine-tuned"): 92.5, ("INT8, trained", "min_max, ARQ"): 92.25,
        ("INT8, trained", "torch.ao"): 91.0, ("INT8, trained", "torch.ao, x86's 7-bit activations"): 91.5,
    }  # fmt: skip
    scores = {_row(*key): {"simulated": [value, value]} for key, value in values.items()}
    peer = best_peers(scores)["INT8, trained"]
    assert peer.name == "torch.ao, x86's 7-bit activations"
    assert line(_row("INT8, trained", "min_max, ARQ"), scores) == (
        "| INT8, trained | min_max, ARQ | 92.25 92.25 | 92.25 | +0.25 ± 0.00* | -0.25 ± 0.00* | +0.75 ± 0.00* |  |"
    )
    assert line(peer, scores).endswith("| -1.00 ± 0.00* |  |  |")
