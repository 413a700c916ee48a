# SPDX-License-Identifier: Apache-2.0
"""The largest (or smallest) values of all data, exactly, as a short sorted list."""

import math

import torch
from torch import Tensor

# How many are kept: a percentile of 0.999999 asks for fewer in up to 128 million entries.
NUM_KEPT = 128
_LEAST_CHUNK = 8


def no_values(device: torch.device | str = "cpu") -> Tensor:
    """A list that nothing has entered yet: of -infinity."""
    return torch.full((NUM_KEPT,), -torch.inf, device=device)


def largest_with(values: Tensor, x: Tensor) -> Tensor:
    """The list after x; give -x, and get the negatives of the smallest.

    The values looked for lie in the chunks that have the largest maxima: x is read once, sorted never.

    >>> largest_with(no_values(), torch.arange(5.0))[:3]
    tensor([4., 3., 2.])
    """
    flat = x.detach().reshape(-1)
    # Of a size at which looking at maxima and looking into chunks cost alike.
    size = math.isqrt(flat.numel() // NUM_KEPT)
    if size >= _LEAST_CHUNK:
        whole = flat.numel() // size * size
        chunks = flat[:whole].view(-1, size)
        chosen = chunks.amax(1).topk(NUM_KEPT).indices
        flat = torch.cat([chunks[chosen].reshape(-1), flat[whole:]])
    best = flat.topk(min(NUM_KEPT, flat.numel())).values
    dtype = torch.promote_types(values.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.cat([values.to(dtype), best.to(dtype)]).topk(NUM_KEPT).values
