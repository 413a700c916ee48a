# SPDX-License-Identifier: Apache-2.0
"""Ratios of their own for layers: by one ranking of all, or by how much a layer's outputs suffer."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import ConfigError
from fxslim.patterns import Block, Pattern
from fxslim.sparsity.mask_choice import Weight, seen_by_weight
from fxslim.sparsity.methods import Hessian, Method
from fxslim.sparsity.methods.method import Seen, output_error

# No layer loses more.
_MOST = 0.95
_GRID = 20


def global_ratios(
    model: nn.Module, patterns: Mapping[str, Pattern], method: Method, data: Data | None
) -> dict[str, Pattern]:
    """The lowest entries or blocks of all layers together go, as many entries as the given ratios remove."""
    weights = {name: Weight(model, name) for name in patterns}
    scores, sizes, owners = [], [], []
    totals: dict[str, int] = {}
    for some, seen in seen_by_weight(model, weights, method, data):
        for name in some:
            rows = weights[name].rows()
            found, units = _by_unit(method.scores(rows, seen[name], patterns[name]), patterns[name])
            scores.append(found.double().cpu().numpy())
            sizes.append(units.cpu().numpy())
            owners.append(np.full(len(found), len(totals)))
            totals[name] = rows.numel()
    order = np.argsort(np.concatenate(scores), kind="stable")
    size, owner = np.concatenate(sizes)[order], np.concatenate(owners)[order]
    most = np.array([_MOST * total for total in totals.values()])
    wanted = sum(totals[name] * (pattern.removed() or 0.0) for name, pattern in patterns.items())
    if wanted > most.sum():
        raise ConfigError(f"ratio is above {_MOST}, which is the most that scope='global' takes from a layer")
    removed, nums = _fill(size, owner, most, wanted)
    made = {}
    for i, name in enumerate(totals):
        pattern = patterns[name]
        whole = len(scores[i]) if isinstance(pattern, Block) else totals[name]
        made[name] = pattern.gentler(float(nums[i] if isinstance(pattern, Block) else removed[i]) / whole)
    return made


def _by_unit(scores: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The score and the size of each entry, or of each block."""
    if not isinstance(pattern, Block):
        return scores.flatten(), torch.ones(scores.numel())
    entries = scores.flatten(2) if scores.dim() > 2 else scores.unsqueeze(2)
    means, sizes = [], []
    for rows in entries.split(pattern.cout, 0):
        for part in rows.split(pattern.cin, 1):
            block = part.double().mean((0, 1))
            num = part.shape[0] * part.shape[1]
            if not pattern.per_position:
                block, num = block.mean(0, keepdim=True), num * part.shape[2]
            means.append(block)
            sizes.append(torch.full_like(block, num))
    return torch.cat(means), torch.cat(sizes)


def _fill(size: np.ndarray, owner: np.ndarray, most: np.ndarray, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """What each layer loses, in entries and units, when units go in this order and layers lose at most so much."""
    num = len(most)
    before = np.zeros(len(size))
    for i in range(num):
        mine = owner == i
        before[mine] = np.cumsum(size[mine])
    allowed = before <= most[owner]
    taken = np.cumsum(np.where(allowed, size, 0.0)) <= wanted + 1e-9
    taken &= allowed
    return np.bincount(owner[taken], size[taken], num), np.bincount(owner[taken], minlength=num)


def adaptive_ratios(
    model: nn.Module, patterns: Mapping[str, Pattern], method: Method, data: Data
) -> dict[str, Pattern]:
    """Ratios that together remove as much, where the sum of the layers' relative output errors is least."""
    weights = {name: Weight(model, name) for name in patterns}
    gradients: dict[str, Seen] = {}
    if method.needs == "gradients":
        for _, seen in seen_by_weight(model, weights, method, data):
            gradients |= seen
    curves: dict[str, np.ndarray] = {}
    for some, seen in seen_by_weight(model, weights, Hessian(), data):
        for name in some:
            known = replace(seen[name], gradient=gradients[name].gradient) if gradients else seen[name]
            curves[name] = _curve(weights[name].rows(), known, patterns[name], method)
    sizes = {name: weights[name].parameter.numel() for name in curves}
    wanted = sum(sizes[name] * (pattern.removed() or 0.0) for name, pattern in patterns.items())
    ratios = _least_error(curves, sizes, wanted)
    return {name: patterns[name].gentler(ratios[name]) for name in patterns}


def _curve(rows: Tensor, seen: Seen, pattern: Pattern, method: Method) -> np.ndarray:
    """The error of a layer's outputs, relative, with nothing, a twentieth, ... of its entries gone."""
    whole = output_error(rows, torch.zeros_like(rows, dtype=torch.bool), seen.parts)
    errors = [0.0]
    for step in range(1, _GRID):
        own = pattern.gentler(step / _GRID)
        mask = own.mask(method.scores(rows, seen, own))
        errors.append(output_error(rows, mask, seen.parts) / whole if whole else 0.0)
    return np.maximum.accumulate(np.array(errors))


def _least_error(curves: Mapping[str, np.ndarray], sizes: Mapping[str, int], wanted: float) -> dict[str, float]:
    """Greedy along the lower convex hulls of the curves, which is optimal for them.

    >>> bent, steep = np.linspace(0, 1, 20) ** 2 / 10, np.linspace(0, 1, 20) ** 2
    >>> found = _least_error({"a": bent, "b": steep}, {"a": 100, "b": 100}, 100)
    >>> found["a"] > found["b"], round(found["a"] + found["b"], 6)
    (True, 1.0)
    """
    steps = []
    for name, curve in curves.items():
        at = 0
        while at < len(curve) - 1:
            slopes = (curve[at + 1 :] - curve[at]) / np.arange(1, len(curve) - at)
            # The flattest way on, and of equal ones the longest.
            to = at + 1 + int(np.flatnonzero(slopes <= slopes.min())[-1])
            steps.append((slopes.min() / sizes[name], name, at, to))
            at = to
    found = dict.fromkeys(curves, 0.0)
    for _, name, at, to in sorted(steps, key=lambda step: (step[0], step[1], step[2])):
        share = min(1.0, wanted / (sizes[name] * (to - at) / _GRID))
        found[name] += share * (to - at) / _GRID
        wanted -= share * sizes[name] * (to - at) / _GRID
        if share < 1:
            return found
    if wanted > 1e-6:
        raise ConfigError(f"scope='adaptive' takes at most {(_GRID - 1) / _GRID:.0%} from a layer: give a lower ratio")
    return found
