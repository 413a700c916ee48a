# SPDX-License-Identifier: Apache-2.0
"""The largest (or smallest) values of all data, exactly, as a short sorted list."""

import math

import torch
from torch import Tensor

# How many are kept: a percentile of 0.999999 asks for fewer in up to 128 million entries.
NUM_KEPT = 128
_LEAST_CHUNK = 32


def no_values(device: torch.device | str = "cpu") -> Tensor:
    """A list that nothing has entered yet: of -infinity."""
    return torch.full((NUM_KEPT,), -torch.inf, device=device)


def largest_with(values: Tensor, x: Tensor) -> Tensor:
    """The list after x, the largest first.

    The values looked for lie in the chunks that have the largest maxima: x is read once, sorted never.

    >>> largest_with(no_values(), torch.arange(5.0))[:3]
    tensor([4., 3., 2.])
    """
    return _extremes_with(values, x, largest=True)


def smallest_with(values: Tensor, x: Tensor) -> Tensor:
    """The list of the smallest values after x, the smallest first. It starts as ``-no_values()``."""
    return _extremes_with(values, x, largest=False)


def _extremes_with(values: Tensor, x: Tensor, *, largest: bool) -> Tensor:
    flat = x.detach().reshape(-1)
    # Of a size at which looking at extremes and looking into chunks cost alike; torch is fastest at powers of two.
    size = max(_LEAST_CHUNK, 1 << math.isqrt(flat.numel() // NUM_KEPT).bit_length())
    if flat.numel() >= 2 * NUM_KEPT * _LEAST_CHUNK:
        whole = flat.numel() // size * size
        chunks = flat[:whole].view(-1, size)
        chosen = _chunks_with_news(values[-1], chunks.amax(1) if largest else chunks.amin(1), largest)
        if chosen.numel() == 0 and whole == flat.numel():
            return values
        flat = torch.cat([chunks[chosen].reshape(-1), flat[whole:]])
    best = flat.topk(min(NUM_KEPT, flat.numel()), largest=largest).values
    dtype = torch.promote_types(values.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.cat([values.to(dtype), best.to(dtype)]).topk(NUM_KEPT, largest=largest).values


def _chunks_with_news(last: Tensor, extremes: Tensor, largest: bool) -> Tensor:
    """Places of the chunks that may hold one of the list, whose last entry is given."""
    if extremes.device.type == "cpu":
        news = (extremes > last if largest else extremes < last).nonzero()[:, 0]
        if news.numel() <= NUM_KEPT:
            return news
    return extremes.topk(NUM_KEPT, largest=largest).indices
