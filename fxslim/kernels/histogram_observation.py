# SPDX-License-Identifier: Apache-2.0
"""observe_histogram: counts in equal-width bins, smallest and largest value, in one pass."""

import math

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.arguments import as_parameter, check_input, in_order, lies_channels_last, math_dtype
from fxslim.kernels.autograd_registration import without_gradient
from fxslim.kernels.observation import min_max_reference

MOST_BINS = 65536

torch.library.define(
    "fxslim::observe_histogram",
    "(Tensor x, Tensor low, Tensor high, int bins, bool channels_last) -> (Tensor, Tensor, Tensor)",
)


def _bin_of(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The bin of each value; ``bins`` for NaN, and for everything where the range can't be used.

    Positions are counted from the point of the range nearest 0. So they are exact where bins start at
    multiples of a power of two, however small a value is beside the range.
    """
    dtype = x.dtype
    # Not bins / tensor, which torch computes as a reciprocal times bins: not exact.
    rate = (torch.full_like(low, bins) / (high - low)).to(dtype)
    anchor = torch.minimum(torch.maximum(torch.zeros_like(low), low), high)
    start = (low - anchor) * rate.double()
    whole = start.floor()
    position = (x - anchor.to(dtype)).mul_(rate).sub_((start - whole).to(dtype)).floor_().sub_(whole.to(dtype))
    usable = (low < high) & (rate > 0)
    for number in (rate, low, high, anchor.to(dtype)):
        usable = usable & torch.isfinite(number)
    position = torch.where(x.isnan() | ~usable, bins, position.clamp_(0, bins - 1))
    return position.to(torch.int64)


def _reference(x: Tensor, low: Tensor, high: Tensor, bins: int, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = in_order(x, channels_last)
    smallest, largest = min_max_reference(x, None, channels_last)
    index = _bin_of(x.reshape(-1).to(math_dtype(x)), low.reshape(()), high.reshape(()), bins)
    return torch.bincount(index, minlength=bins + 1)[:bins].clone(), smallest, largest


torch.library.impl("fxslim::observe_histogram", "default", _reference)


@torch.library.register_fake("fxslim::observe_histogram")
def _fake(x, low, high, bins, channels_last):  # type: ignore[no-untyped-def]
    smallest, largest = (x.new_empty([], dtype=math_dtype(x)) for _ in range(2))
    return x.new_empty([bins], dtype=torch.int64), smallest, largest


without_gradient("fxslim::observe_histogram")


def _check_range(low: Tensor, high: Tensor) -> None:
    """Looked at only where that is free; an unusable range elsewhere counts nothing."""
    if torch.compiler.is_compiling() or type(low) is not Tensor or low.device.type != "cpu":
        return
    first, last = low.item(), high.item()
    if not (first < last and math.isfinite(last - first)):
        raise ConfigError(f"low={first:g}, high={last:g}: bins need finite numbers, low below high")


def observe_histogram(x: Tensor, low: Tensor | float, high: Tensor | float, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (int64) of x in equal-width bins over [low, high]; and its smallest and largest value.

    Values outside, infinities too, count in the nearest bin; ``high`` itself belongs to the last. NaN is
    counted nowhere and makes both extrema NaN. The extrema are float32 (float64 for float64 input);
    nothing carries a gradient. Where ``low`` and ``high`` are tensors on x's device, a GPU is not waited
    for; there, a range that is empty or not finite counts nothing. An empty x is an error.

    >>> observe_histogram(torch.tensor([-3.0, 0.1, 0.6, 1.0]), 0.0, 1.0, bins=2)
    (tensor([2, 2]), tensor(-3.), tensor(1.))
    """
    check_input(x)
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise DtypeError(f"bins must be an int, got {bins!r}")
    if not 1 <= bins <= MOST_BINS:
        raise ConfigError(f"bins={bins} must be in [1, {MOST_BINS}]")
    if not torch.compiler.is_compiling() and x.numel() == 0:
        raise ConfigError(f"x has shape {tuple(x.shape)}: an empty tensor has no smallest value")
    # In float64, whatever x is: the ends of bins may lie beyond what x can hold.
    first = as_parameter(low, "low", x, None, torch.float64).detach()
    last = as_parameter(high, "high", x, None, torch.float64).detach()
    _check_range(first, last)
    counts, smallest, largest = torch.ops.fxslim.observe_histogram(x.detach(), first, last, bins, lies_channels_last(x))
    return counts, smallest, largest
