# SPDX-License-Identifier: Apache-2.0
"""Ratios of their own for layers, by how much the model's outputs suffer."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import CalibrationError
from fxslim.graph.inputs import output_tensors
from fxslim.graph.recording import undisturbed
from fxslim.patterns import Pattern
from fxslim.sparsity.mask_choice import Weight, seen_by_weight
from fxslim.sparsity.methods import Hessian, Method
from fxslim.sparsity.methods.method import Seen, output_error

_GRID = 20
# How far a layer's ratio may be from the given one: down, and up of what the given one leaves.
_LESS, _MORE = 0.25, 0.5


def adaptive_ratios(
    model: nn.Module, patterns: Mapping[str, Pattern], method: Method, data: Data
) -> dict[str, Pattern]:
    """Ratios that together remove as much, where what the model's outputs lose is least, as far as layers tell.

    How the error of a layer's own outputs grows with its ratio is known from what it reads; what an error there does
    to the model is measured once, on one batch, at the given ratio.
    """
    weights = {name: Weight(model, name) for name in patterns}
    gradients: dict[str, Seen] = {}
    if method.needs == "gradients":
        for _, seen in seen_by_weight(model, weights, method, data):
            gradients |= seen
    batch = next(iter(data))
    whole = _outputs(model, data, batch)
    curves: dict[str, np.ndarray] = {}
    for some, seen in seen_by_weight(model, weights, Hessian(), data):
        for name in some:
            known = replace(seen[name], gradient=gradients[name].gradient) if gradients else seen[name]
            curve = _curve(weights[name], known, patterns[name], method)
            with _masked_once(weights[name], known, patterns[name], method) as own:
                lost = _distance(_outputs(model, data, batch), whole)
            curves[name] = curve * (lost / own if own > 0 else 0.0)
    sizes = {name: weights[name].parameter.numel() for name in curves}
    wanted = sum(sizes[name] * (pattern.removed() or 0.0) for name, pattern in patterns.items())
    bounds = {name: _bounds(pattern.removed() or 0.0) for name, pattern in patterns.items()}
    ratios = _least_error(curves, sizes, bounds, wanted)
    return {name: patterns[name].gentler(ratios[name]) for name in patterns}


def _outputs(model: nn.Module, data: Data, batch: Any) -> list[Tensor]:
    with torch.inference_mode(False), undisturbed(model, training=False), torch.no_grad():
        return [output.double() for output in output_tensors(data.forward(model, batch))]


def _distance(found: list[Tensor], whole: list[Tensor]) -> float:
    """The squared distance of outputs, relative."""
    if [one.shape for one in found] != [one.shape for one in whole] or not whole:
        raise CalibrationError("scope='adaptive' compares outputs, whose number depends on the weights here")
    pairs = list(zip(found, whole, strict=True))
    length = sum(float(b.square().sum()) for _, b in pairs)
    return sum(float((a - b).square().sum()) for a, b in pairs) / max(length, torch.finfo(torch.float64).tiny)


@contextmanager
def _masked_once(weight: Weight, seen: Seen, pattern: Pattern, method: Method) -> Iterator[float]:
    """The weight masked for a while; gives the squared error of the layer's own outputs."""
    rows = weight.rows()
    mask, values = method.choose(rows, seen, pattern)
    parameter = weight.parameter
    old = parameter.data
    try:
        parameter.data = weight.layout.restored(torch.where(mask, rows if values is None else values, 0))
        yield output_error(rows, mask, seen.parts, values)
    finally:
        parameter.data = old


def _curve(weight: Weight, seen: Seen, pattern: Pattern, method: Method) -> np.ndarray:
    """The squared error of a layer's outputs with nothing, a twentieth, ... of its entries gone."""
    rows, errors = weight.rows(), [0.0]
    low, high = _bounds(pattern.removed() or 0.0)
    for step in range(1, high + 1):
        if step < low:
            errors.append(0.0)
            continue
        own = pattern.gentler(step / _GRID)
        mask, values = method.choose(rows, seen, own)
        errors.append(output_error(rows, mask, seen.parts, values))
    return np.maximum.accumulate(np.array(errors))


def _bounds(ratio: float) -> tuple[int, int]:
    """What a layer loses at least and at most, in twentieths: an error far from the one measured is not known.

    >>> _bounds(0.5), _bounds(0.8)
    ((5, 15), (11, 18))
    """
    return max(0, math.ceil((ratio - _LESS) * _GRID - 1e-9)), math.floor((ratio + _MORE * (1 - ratio)) * _GRID + 1e-9)


def _least_error(
    curves: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    bounds: Mapping[str, tuple[int, int]],
    wanted: float,
) -> dict[str, float]:
    """Greedy along the lower convex hulls of the curves, which is optimal for them.

    >>> bent, steep = np.linspace(0, 1, 20) ** 2 / 10, np.linspace(0, 1, 20) ** 2
    >>> found = _least_error({"a": bent, "b": steep}, {"a": 10, "b": 10}, {"a": (0, 19), "b": (0, 19)}, 10)
    >>> found["a"] > found["b"], round(found["a"] + found["b"], 6)
    (True, 1.0)
    """
    steps = []
    for name, curve in curves.items():
        at, last = bounds[name]
        while at < last:
            slopes = (curve[at + 1 : last + 1] - curve[at]) / np.arange(1, last - at + 1)
            # The flattest way on, and of equal ones the longest.
            to = at + 1 + int(np.flatnonzero(slopes <= slopes.min())[-1])
            steps.append((slopes.min() / sizes[name], name, at, to))
            at = to
    found = {name: bounds[name][0] / _GRID for name in curves}
    wanted -= sum(found[name] * sizes[name] for name in curves)
    for _, name, at, to in sorted(steps, key=lambda step: (step[0], step[1], step[2])):
        share = min(1.0, wanted / (sizes[name] * (to - at) / _GRID))
        found[name] += share * (to - at) / _GRID
        wanted -= share * sizes[name] * (to - at) / _GRID
        if share < 1:
            return found
    return found
