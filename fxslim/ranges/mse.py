# SPDX-License-Identifier: Apache-2.0
"""The range of the least expected squared quantization error."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fxslim.kernels import quantization_errors
from fxslim.ranges.integer_grids import integer_grid
from fxslim.ranges.method import HistogramMethod
from fxslim.ranges.symmetric_ranges import symmetric_ends, symmetric_scale


def _stages(parts: Tensor, reaches: Sequence[float], both: bool) -> list[tuple[Tensor, Tensor]]:
    """Of each look, by what it multiplies both ends that the one before found best."""
    around = [2.0 ** (torch.linspace(-1, 1, 7, dtype=torch.float64) * reach) for reach in reaches]
    looks = []
    for ups in (parts, *around):
        downs = ups if both else torch.ones(1, dtype=torch.float64)
        looks.append((downs.repeat_interleave(ups.numel()), ups.repeat(downs.numel())))
    return looks


# Down to 1/181 of the extremes: closely for one end, coarsely for two; then ever closer.
_ONE_END = _stages(2.0 ** (torch.arange(61, dtype=torch.float64) / -8), [0.125], both=False)
_TWO_ENDS = _stages(2.0 ** (torch.arange(11, dtype=torch.float64) * -0.75), [0.5, 0.17, 0.06], both=True)


class Mse(HistogramMethod):
    """Both ends are searched together, coarse to fine; a symmetric range has one number to search.

    >>> method = Mse()
    >>> method.observe(torch.cat([torch.linspace(-1, 1, 1_000_000), torch.tensor([3.0])]))
    >>> [round(end.item(), 1) for end in method.range(-128, 127)]
    [-1.0, 1.0]
    """

    name: ClassVar[str] = "mse"

    def __init__(self, *, bins: int = 2048) -> None:
        super().__init__(bins)

    def _chosen(self, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        edges, counts = self.histogram.edges()
        low, high = edges[0].clamp(max=0) + 0.0, edges[-1].clamp(min=0) + 0.0
        if low == high:
            return self._as_clips(low, high)
        num_points = quant_max - quant_min + 1
        whole = symmetric_scale(low, high, quant_min, quant_max)

        def clips(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
            if symmetric:
                return symmetric_ends(whole * up, quant_min, quant_max)
            return (low * down, high * up) if high > 0 else (low * up, high * down)

        def errors(down: Tensor, up: Tensor) -> Tensor:
            return quantization_errors(edges, counts, *integer_grid(*clips(down, up), num_points), num_points)

        down, up = _least(errors, both=not symmetric and bool(low < 0 < high))
        return self._as_clips(*(end[0] for end in clips(down, up)))


def _least(errors: Callable[[Tensor, Tensor], Tensor], both: bool) -> tuple[Tensor, Tensor]:
    """The parts of both extremes (or of the only one) at which the error is least."""
    down = up = torch.ones(1, dtype=torch.float64)
    for by_down, by_up in _TWO_ENDS if both else _ONE_END:
        downs, ups = (down * by_down).clamp_(max=1), (up * by_up).clamp_(max=1)
        best = errors(downs, ups).argmin()
        down, up = downs[best, None], ups[best, None]
    return down, up
