# SPDX-License-Identifier: Apache-2.0
"""Ratios of their own for layers, by one ranking of all."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import ConfigError
from fxslim.patterns import Block, Pattern
from fxslim.sparsity.mask_choice import Weight, seen_by_weight
from fxslim.sparsity.methods import Method

# No layer loses more.
_MOST = 0.95


def global_ratios(
    model: nn.Module, patterns: Mapping[str, Pattern], method: Method, data: Data | None
) -> dict[str, Pattern]:
    """The lowest entries or blocks of all layers together go, as many entries as the given ratios remove."""
    weights = {name: Weight(model, name) for name in patterns}
    meta = [name for name, weight in weights.items() if weight.parameter.is_meta]
    if meta:
        raise ConfigError(f"scope='global' ranks weights, and {meta[0]} is on the meta device: give the model values")
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
    removed, nums = fill(size, owner, most, wanted)
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


def fill(size: np.ndarray, owner: np.ndarray, most: np.ndarray, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """What each layer loses, in entries and units, when units go in this order and layers lose at most so much."""
    num = len(most)
    # Float32 stops counting at 2^24.
    size = size.astype(np.float64)
    before = np.zeros(len(size))
    for i in range(num):
        mine = owner == i
        before[mine] = np.cumsum(size[mine])
    allowed = before <= most[owner]
    taken = np.cumsum(np.where(allowed, size, 0.0)) <= wanted + 1e-9
    taken &= allowed
    return np.bincount(owner[taken], size[taken], num), np.bincount(owner[taken], minlength=num)
