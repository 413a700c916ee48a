# SPDX-License-Identifier: Apache-2.0
"""The range at which a quantized histogram tells most about the original: the least KL divergence."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fxslim.ranges.histogram import Histogram
from fxslim.ranges.method import HistogramMethod
from fxslim.ranges.symmetric_ranges import range_with_zero

# What is cut off may come to lie in a bin that is empty itself: its divergence is large, not infinite.
_ALMOST_NOTHING = 1e-4


class Entropy(HistogramMethod):
    """TensorRT's calibration: bins of magnitudes are cut off from above; what is cut off counts in the last one
    left; those left are quantized into as many levels as the grid has on one side of 0.

    An asymmetric grid has twice as many levels for data on one side of 0. Grids with more levels than there
    are bins get the whole range.

    >>> method = Entropy()
    >>> method.observe(torch.cat([torch.linspace(-1, 1, 20_000), torch.tensor([9.0])]))
    >>> [round(end.item(), 1) for end in method.range(-128, 127)]
    [-1.0, 1.0]
    """

    name: ClassVar[str] = "entropy"

    def __init__(self, *, bins: int = 2048) -> None:
        super().__init__(bins)

    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        edges, _ = self.histogram.edges()
        low, high = edges[0], edges[-1]
        one_sided = bool(low >= 0) or bool(high <= 0)
        levels = (quant_max - quant_min + 1) // (1 if one_sided and not symmetric else 2)
        counts, width = magnitudes(self.histogram)
        limit = torch.tensor(least_divergent(counts, levels) * width, dtype=torch.float64)
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        return self._as_clips(*range_with_zero(low, high, quant_min, quant_max, symmetric))


def magnitudes(histogram: Histogram) -> tuple[np.ndarray, float]:
    """Counts of |x| in bins from 0 to the largest magnitude, and their width.

    Data of a narrow range far from 0 gets wider bins than the histogram has, so that they are as many.
    """
    position = histogram.start.cpu() + torch.arange(histogram.bins)
    counts = histogram.counts.cpu()
    full = counts > 0
    folded, width = torch.where(position < 0, -1 - position, position)[full], histogram.width.item()
    while folded.max() >= histogram.bins:
        folded, width = folded // 2, width * 2
    sums = torch.zeros(int(folded.max()) + 1, dtype=torch.int64).index_add_(0, folded, counts[full])
    return sums.numpy(), width


def least_divergent(counts: np.ndarray, levels: int) -> int:
    """How many bins to keep: those that are empty up to the first value, and at least as many as there are levels."""
    least = int(np.flatnonzero(counts)[0]) + levels
    if counts.size <= least:
        return counts.size
    weights = counts.astype(np.float64)
    # Zeros are quantized exactly, however many there are.
    weights[0] = min(weights[0], weights[1])
    kept = np.arange(least, counts.size + 1)
    return int(kept[np.argmin([divergence(weights, int(count), levels) for count in kept])])


def divergence(weights: np.ndarray, kept: int, levels: int) -> float:
    """KL divergence of the bins kept from what quantization into levels leaves of them.

    >>> import numpy as np
    >>> round(divergence(np.array([1.0, 1.0, 2.0, 0.0]), 4, 2), 3)
    0.0
    """
    original = weights[:kept].copy()
    full = original > 0
    # A level's weight is spread evenly over its bins that hold something.
    level = np.arange(kept) * levels // kept
    spread = np.bincount(level, original, levels) / np.maximum(np.bincount(level, full, levels), 1)
    quantized = np.where(full, spread[level], 0.0)
    original[-1] += weights[kept:].sum()
    seen = original > 0
    quantized[seen & (quantized == 0)] = _ALMOST_NOTHING
    p, q = original[seen] / original.sum(), quantized[seen] / quantized.sum()
    return float(np.sum(p * np.log(p / q)))
