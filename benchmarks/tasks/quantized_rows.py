# SPDX-License-Identifier: Apache-2.0
"""Quantized networks for the ranking task: ours and torch.ao's, trained on the grid or calibrated only."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.tasks import torch_ao_rows
from benchmarks.tasks.contest import EXAMPLE, Contest
from benchmarks.tasks.training import Recipe, accuracy, train
from fxslim import QuantConfig
from fxslim.nn import ActivationQuant, WeightQuant

Batches = list[tuple[Tensor, Tensor]]


def _as_it_is(model: nn.Module) -> dict[str, nn.Module]:
    return {"simulated": model}


def _both_of_torch_ao(model: nn.Module) -> dict[str, nn.Module]:
    return {"simulated": torch_ao_rows.simulated(model), "integer": torch_ao_rows.converted(model)}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contestant: how a trained network is prepared, whether it then trains, and what of it is tested."""

    group: str
    name: str
    prepare: Callable[[nn.Module, Tensor, Batches], nn.Module]
    trains: bool
    tested: Callable[[nn.Module], dict[str, nn.Module]] = _as_it_is

    @property
    def is_peer(self) -> bool:
        """Whether it is torch.ao's."""
        return self.tested is _both_of_torch_ao


def measured(row: Row, base: nn.Module, contest: Contest, recipe: Recipe, seed: int) -> dict[str, float]:
    """Test accuracies in percent of what is tested."""
    torch.manual_seed(seed)
    model = row.prepare(base, EXAMPLE, contest.batches)
    if row.trains:
        model = train(model, contest.pictures, recipe, 1000 + seed)
    return {name: accuracy(one, contest.unseen) for name, one in row.tested(model).items()}


def _float(base: nn.Module, example: Tensor, batches: Batches) -> nn.Module:
    return copy.deepcopy(base)


def _trained(base: nn.Module, example: Tensor, batches: Batches, *, config: Any, **wishes: Any) -> nn.Module:
    return fxslim.prepare_qat(copy.deepcopy(base), config, example_inputs=example, **wishes)


def _calibrated(base: nn.Module, example: Tensor, batches: Batches, **wishes: Any) -> nn.Module:
    return fxslim.quantize(copy.deepcopy(base), data=batches, **wishes)


def _peer_trained(base: nn.Module, example: Tensor, batches: Batches, **settings: Any) -> nn.Module:
    return torch_ao_rows.prepare_trained(base, example, **settings)


def _peer_calibrated(base: nn.Module, example: Tensor, batches: Batches, **settings: Any) -> nn.Module:
    return torch_ao_rows.prepare_calibrated(base, example, batches, **settings)


def _group(group: str, trains: bool, ours: dict[str, dict[str, Any]], peers: dict[str, dict[str, Any]]) -> list[Row]:
    kinds = (_trained, _peer_trained) if trains else (_calibrated, _peer_calibrated)
    rows = [
        Row(group=group, name=name, prepare=functools.partial(kinds[0], **wishes), trains=trains)
        for name, wishes in ours.items()
    ]
    rows += [
        Row(
            group=group, name=name, prepare=functools.partial(kinds[1], **settings), trains=trains,
            tested=_both_of_torch_ao,
        )
        for name, settings in peers.items()
    ]  # fmt: skip
    return rows


_PEERS = {
    bits: {
        "torch.ao": {"bits": bits, "reduce_range": False},
        "torch.ao, x86's 7-bit activations": {"bits": bits, "reduce_range": True},
    }
    for bits in (8, 4)
}
ROWS = (
    Row(group="float", name="float", prepare=_float, trains=False),
    Row(group="float", name="float, fine-tuned", prepare=_float, trains=True),
    *_group(
        "INT8, trained",
        True,
        {
            "ULQ, ARQ (default)": {"config": "int8"},
            "LSQ, ARQ": {"config": QuantConfig(activation=ActivationQuant(method="lsq"))},
            "min_max, ARQ": {"config": QuantConfig(activation=ActivationQuant(method="min_max"))},
        },
        _PEERS[8],
    ),
    *_group(
        "4-bit weights, trained",
        True,
        {
            "ULQ, ARQ": {"config": "w4a8"},
            "ULQ, LSQ": {"config": QuantConfig(weight=WeightQuant(bits=4, method="lsq"))},
        },
        {"torch.ao": _PEERS[4]["torch.ao"]},
    ),
    *_group(
        "INT8, calibrated",
        False,
        {name: {"calibration": name} for name in ("mse", "min_max", "percentile")},
        _PEERS[8],
    ),
    *_group(
        "4-bit weights, calibrated",
        False,
        {"mse": {"config": "w4a8", "calibration": "mse"}},
        {"torch.ao": _PEERS[4]["torch.ao"]},
    ),
)
