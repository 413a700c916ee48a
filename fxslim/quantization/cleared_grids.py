# SPDX-License-Identifier: Apache-2.0
"""Grids on which no result of integers lies halfway between two steps.

A sum of two tensors on grids has 65,536 different values at most. Runtimes compute them in float, each in its own
order, and what lies nearly halfway between two steps comes out on either side. A range that is wider or narrower by a
ten-thousandth leaves nothing there, so that all runtimes agree, to the last integer.
"""

import contextlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from fxslim.errors import TraceError
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import Recording, record
from fxslim.nn.quantizers import ActivationQuantizer, each_activation_quantizer
from fxslim.nn.quantizers.observed import StaticActivations
from fxslim.quantization.dataflow import Dataflow
from fxslim.quantization.value_tables import Levels, ValueTables

# How far from the middle a value must stay, in steps: some last places of float32 at 255 steps. The first that is
# possible counts.
_CLEARANCES = (1e-4, 6e-5, 4e-5, 2.5e-5, 1.5e-5)
# The most that a range changes, as a part of it: at the far end of 255 steps an eighth of one.
_REACH = 5e-4


def clear_grids(model: nn.Module, examples: Iterable[Inputs]) -> None:
    """Change ranges that calibration found so that nothing these forwards compute from integers lies halfway.

    An example that the model, changed since it was planned, no longer takes tells nothing, and ranges stay as found.
    """
    quantizers = each_activation_quantizer(model)
    device = next((quantizer.scale.device for quantizer in quantizers.values()), None)
    done: set[str] = set()
    for inputs in examples:
        if inputs.have_values:
            with contextlib.suppress(TraceError):
                recording = record(model, inputs.with_tensors(lambda value: value.to(device)))
                done |= _clear(recording, quantizers, done)


def _clear(recording: Recording, quantizers: dict[str, ActivationQuantizer], done: set[str]) -> set[str]:
    """One after the other: what comes later is computed from the ranges before."""
    flow = Dataflow(recording)
    levels: dict[torch.fx.Node, Levels] = {}
    tables = ValueTables(flow, levels)
    cleared = set()
    for call in recording.calls:
        quantizer = quantizers.get(call.name)
        if quantizer is None or flow.calls_of[call.name] != 1 or len(call.outputs) != 1 or not call.inputs:
            continue
        if not (quantizer.is_quantizing and quantizer.config.format == "int" and quantizer.config.bits <= 8):
            continue
        if call.name not in done and type(quantizer) is StaticActivations and quantizer.scale.dtype != torch.float16:
            values = tables.of(call.inputs[0])
            if values:
                _rescale(quantizer, torch.cat(values).numpy())
                cleared.add(call.name)
        levels[call.outputs[0]] = _levels(quantizer)
    return cleared


def _levels(quantizer: ActivationQuantizer) -> Levels:
    scale, zero_point = (one.item() for one in quantizer.grid())
    least, most = quantizer.config.grid
    return Levels(float(scale), least - int(zero_point), most - int(zero_point))


@torch.inference_mode(False)
def _rescale(quantizer: StaticActivations, values: np.ndarray) -> None:
    scale, least, most = _levels(quantizer)
    for clearance in _CLEARANCES:
        for factor in _free_factors(values / scale, least, most, clearance):
            changed = torch.tensor(scale * factor, dtype=quantizer.scale.dtype, device="cpu")
            # The scale is rounded too.
            if _clearance(values / changed.item(), least, most) > clearance / 2:
                quantizer.scale = torch.empty_like(quantizer.scale).copy_(changed)
                return


def _in_range(steps: np.ndarray, least: int, most: int) -> np.ndarray:
    """Without what is cut off, and what no factor brings near a middle."""
    return steps[(steps > least - 0.6) & (steps < most + 0.6) & (np.abs(steps) > 0.4)]


def _clearance(steps: np.ndarray, least: int, most: int) -> float:
    steps = _in_range(steps, least, most)
    return float(np.abs(steps - np.floor(steps) - 0.5).min(initial=0.5))


def _free_factors(steps: np.ndarray, least: int, most: int, clearance: float) -> list[float]:
    """Factors of the scale with which no value is near a middle; those that change least first."""
    steps = np.abs(_in_range(steps, least, most))
    middles = np.floor(steps) + 0.5
    near = np.abs(steps - middles) <= steps * _REACH + clearance
    steps, middles = steps[near], middles[near]
    starts, ends = steps / (middles + clearance) - 1, steps / (middles - clearance) - 1
    order = np.argsort(starts)
    starts = np.append(starts[order], _REACH)
    ends = np.maximum.accumulate(np.insert(ends[order], 0, -_REACH))
    free = (starts > ends) & (ends < _REACH)
    change = np.where((ends[free] < 0) & (starts[free] > 0), 0.0, (ends[free] + starts[free]) / 2)
    return [1 + float(one) for one in sorted(change, key=abs)[:8]]
