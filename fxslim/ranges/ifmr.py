# SPDX-License-Identifier: Apache-2.0
"""IFMR: start at percentiles, try ranges around them, keep the one of the least squared error."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels import quantization_errors
from fxslim.ranges.integer_grids import integer_grid
from fxslim.ranges.percentile import Percentile
from fxslim.ranges.symmetric_ranges import symmetric_ends, symmetric_scale


class Ifmr(Percentile):
    """Candidates r = start, start + step, ... below end of ``search_range``.

    Asymmetric: clip_max = r * its percentile, clip_min stays at its own. Symmetric: r * the scale that holds
    both percentiles. The error of a candidate is that of the histogram, not of all data kept in memory.

    >>> method = Ifmr(search_range=(0.5, 1.1), search_step=0.25)
    >>> method.observe(torch.tensor([-1.0, 0.0, 3.0]))
    >>> method.range(0, 3)
    (tensor(-1.), tensor(3.))
    """

    name: ClassVar[str] = "ifmr"

    def __init__(
        self,
        *,
        max_percentile: float = 0.999999,
        min_percentile: float = 0.999999,
        search_range: Sequence[float] = (0.7, 1.3),
        search_step: float = 0.01,
        bins: int = 2048,
    ) -> None:
        super().__init__(max_percentile=max_percentile, min_percentile=min_percentile, bins=bins)
        start, end = _checked_search(search_range, search_step)
        # A step that would end at `end` itself, but for rounding, is left out.
        count = math.ceil((end - start) / search_step - 1e-9)
        self._ratios = start + search_step * torch.arange(count, dtype=torch.float64)

    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        clip_min, clip_max = self.ends()
        clip_min, clip_max = clip_min.clamp(max=0) + 0.0, clip_max.clamp(min=0) + 0.0
        if clip_min == clip_max:
            return self._as_clips(clip_min, clip_max)
        num_points = quant_max - quant_min + 1
        if symmetric:
            steps = self._ratios * symmetric_scale(clip_min, clip_max, quant_min, quant_max)
            lows, highs = symmetric_ends(steps, quant_min, quant_max)
        else:
            highs = self._ratios * clip_max
            lows = clip_min.expand_as(highs)
        grids = integer_grid(lows, highs, num_points)
        best = quantization_errors(*self.histogram.edges(), *grids, num_points).argmin()
        return self._as_clips(lows[best], highs[best])


def _checked_search(search_range: Sequence[float], search_step: float) -> tuple[float, float]:
    numbers = list(search_range) if isinstance(search_range, list | tuple) else []
    if len(numbers) != 2 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise ConfigError(f"search_range={search_range!r} must be two numbers (start, end)")
    start, end = numbers
    if not 0 < start < end < math.inf:
        raise ConfigError(f"search_range={search_range!r} must increase, and start above 0")
    if isinstance(search_step, bool) or not isinstance(search_step, int | float):
        raise ConfigError(f"search_step={search_step!r} must be a number")
    if not 0 < search_step <= (end - start) * (1 + 1e-9):
        raise ConfigError(f"search_step={search_step:g} must be in (0, {end - start:g}], the width of search_range")
    return start, end
