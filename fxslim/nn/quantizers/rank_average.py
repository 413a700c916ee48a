# SPDX-License-Identifier: Apache-2.0
"""The same numbers on all ranks of a distributed run."""

import torch
from torch import Tensor
from torch import distributed as dist


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """The mean of each over all ranks; as they are where there is one process.

    >>> average_over_ranks(torch.ones(1))
    (tensor([1.]),)
    """
    if num_ranks() == 1:
        return values
    together = torch.cat([value.reshape(-1) for value in values])
    dist.all_reduce(together)
    together = together / num_ranks()
    parts = together.split([value.numel() for value in values])
    return tuple(part.reshape(value.shape) for part, value in zip(parts, values, strict=True))
