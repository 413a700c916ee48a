# SPDX-License-Identifier: Apache-2.0
"""HFMG: outer bins of a histogram are given up little by little; the range of the least error is kept."""

from bisect import bisect_left, bisect_right
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels import quantization_errors
from fxslim.ranges.method import HistogramMethod
from fxslim.ranges.symmetric_ranges import range_with_zero

_BINS = (1024, 2048, 4096, 8192)
# A turn gives up this part of all counts.
_TURN = 1e-5


class Hfmg(HistogramMethod):
    """From all bins, turn by turn, the side that gives up more bins for 1/100,000 of the counts loses them,
    until a quarter of the bins is left. The error of a range of bins is that of as many equal cells as the
    grid has integers: every value goes to the middle of its cell, one outside to the nearest cell.

    >>> method = Hfmg()
    >>> method.observe(torch.cat([torch.linspace(-1, 1, 1_000_000), torch.tensor([3.0])]))
    >>> [round(end.item(), 2) for end in method.range(-128, 127)]
    [-1.0, 1.0]
    """

    name: ClassVar[str] = "hfmg"

    def __init__(self, *, bins: int = 4096) -> None:
        if bins not in _BINS:
            raise ConfigError(f"bins={bins!r} must be one of {', '.join(map(str, _BINS))}")
        super().__init__(bins)

    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        edges, counts = self.histogram.edges()
        num_points = quant_max - quant_min + 1
        path = torch.tensor(search_path(counts.numpy()))
        lows, highs = edges[path[:, 0]], edges[path[:, 1] + 1]
        cells = (highs - lows) / num_points
        best = 0
        if len(path) > 1:
            best = int(quantization_errors(edges, counts, lows + cells / 2, cells, num_points).argmin())
        return self._as_clips(*range_with_zero(lows[best], highs[best], quant_min, quant_max, symmetric))


def search_path(counts: np.ndarray) -> list[tuple[int, int]]:
    """The candidates: first and last bin of each, the widest first.

    >>> import numpy as np
    >>> search_path(np.array([1, 0, 0, 50_000, 50_000, 1]))
    [(0, 5), (3, 5)]
    """
    total = int(counts.sum())
    turn = -(-total // round(1 / _TURN))
    upto = np.cumsum(counts).tolist()
    left, right = 0, counts.size - 1
    # How many counts each side has been asked for.
    from_left = from_right = 0
    path = [(left, right)]
    while right - left > -(-counts.size // 4) and from_left + from_right < total:
        next_left = bisect_right(upto, from_left + turn)
        next_right = bisect_left(upto, total - from_right - turn)
        if next_left - left > right - next_right:
            left, from_left = next_left, from_left + turn
        else:
            right, from_right = next_right, from_right + turn
        if left >= right:
            break
        if path[-1] != (left, right):
            path.append((left, right))
    return path
