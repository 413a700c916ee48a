# SPDX-License-Identifier: Apache-2.0
"""Data that ranges can be made of: some, and finite."""

import math

import torch
from torch import Tensor

from fxslim.errors import CalibrationError


def num_not_finite(x: Tensor) -> Tensor:
    """How many entries are NaN or infinite: a tensor, which no device is waited for.

    >>> num_not_finite(torch.tensor([1.0, torch.nan, torch.inf]))
    tensor(2)
    """
    return x.numel() - torch.isfinite(x).sum()


def are_finite(low: Tensor, high: Tensor) -> bool:
    """Whether both are, on the CPU, where looking is free: the ends of data tell of all of it.

    >>> are_finite(torch.tensor(0.0), torch.tensor(torch.inf))
    False
    """
    if low.device.type != "cpu":
        return False
    if low.dim() == 0:
        return math.isfinite(low.item()) and math.isfinite(high.item())
    return bool((low - low + high - high == 0).all())


def check_seen(num_seen: Tensor | int, num_bad: Tensor) -> None:
    """Raise unless something was observed, and all of it finite."""
    if num_bad > 0:
        raise CalibrationError(
            f"{int(num_bad)} of {int(num_seen)} observed entries are NaN or infinite: no range holds them."
            " Look for a layer that overflows (half precision?), or leave such batches out"
        )
    if num_seen == 0:
        raise CalibrationError("nothing was observed yet: run batches through the model first")
