# SPDX-License-Identifier: Apache-2.0
"""A pruned network that stands for a criterion; ours are made here, by ``plan_pruning``."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import fxslim


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A network right after pruning, its macs, and under which settings, where there were several.

    ``mended`` is the same network where its method repairs more than the statistics of batch norms.
    """

    model: nn.Module
    macs: int
    settings: str = ""
    mended: nn.Module | None = None


def our_candidate(
    name: str, base: nn.Module, example: Tensor, batches: list[tuple[Tensor, Tensor]], **settings: Any
) -> Candidate:
    """``l2`` is ``importance="l2"``; ``l2+least_squares`` also repairs: ``repair="least_squares"``."""
    importance, _, repair = name.partition("+")
    settings |= {"importance": importance, "data": batches}
    plan = fxslim.plan_pruning(base, example, **settings)
    pruned, mended = plan.apply(copy.deepcopy(base)), None
    if repair:
        mended = fxslim.plan_pruning(base, example, **settings | {"repair": repair}).apply(copy.deepcopy(base))
    return Candidate(model=pruned, macs=plan.macs[1], mended=mended)
