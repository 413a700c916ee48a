# SPDX-License-Identifier: Apache-2.0
"""Any entries go, chosen by what their removal costs."""

import torch
from torch import Tensor

from fxslim.patterns import Unstructured
from fxslim.sparsity.column_order import Run
from fxslim.sparsity.column_updates import Columns


def remove_entries(columns: Columns, runs: list[Run], pattern: Unstructured, block_size: int) -> Tensor:
    """The mask, as columns.

    How many go in each run follows from the costs at the start: early columns are cheap, as all later ones make up
    for them. Which ones go is decided by the costs when their turn comes.
    """
    mask = torch.ones_like(columns.values, dtype=torch.bool)
    # A column of these is what shares one count: an output, or the whole weight.
    shared = (-1, mask.shape[1] if pattern.per_output else 1)
    cost = (columns.values * columns.scale).square_().view(shared)
    num_removed = round((pattern.ratio or 0.0) * len(cost))
    if not num_removed:
        return mask
    counts = count_lowest(cost, num_removed, runs[0][1] * mask.shape[1] // cost.shape[1])
    for count, (start, stop) in zip(counts, columns.walk(runs, block_size), strict=True):
        cost = (columns.values[start:stop] * columns.scale[start:stop]).square_()
        mask[start:stop] = keep_highest(cost.view(shared), count).view(cost.shape)
        columns.settle_each(start, stop, mask[start:stop])
    return mask


def count_lowest(scores: Tensor, num_lowest: int, length: int) -> Tensor:
    """How many of the lowest of each column are in each run of rows; of equal ones the later are lower.

    >>> count_lowest(torch.tensor([[1.0], [0.0], [1.0], [2.0]]), 2, 2)
    tensor([[1],
            [1]])
    """
    limit = scores.kthvalue(num_lowest, dim=0).values
    runs = scores.split(length)
    lower = torch.stack([(run < limit).sum(0) for run in runs])
    equal = torch.stack([(run == limit).sum(0) for run in runs])
    after = equal.flip(0).cumsum(0).flip(0) - equal
    return lower + (num_lowest - lower.sum(0) - after).clamp(min=0).minimum(equal)


def keep_highest(scores: Tensor, num_removed: Tensor) -> Tensor:
    """All but so many of each column, which may differ; of equal ones the later go.

    >>> keep_highest(torch.tensor([[1.0, 3.0], [1.0, 2.0]]), torch.tensor([1, 0]))
    tensor([[ True,  True],
            [False,  True]])
    """
    last = num_removed - 1
    if len(last) == 1:
        limit = scores.kthvalue(max(1, int(num_removed)), dim=0).values
    else:
        # Sorting along the last dim is twice as fast.
        limit = scores.t().contiguous().sort(1).values.gather(1, last.clamp(min=0).unsqueeze(1)).squeeze(1)
    limit = torch.where(last < 0, -torch.inf, limit)
    kept = scores > limit
    stays = len(scores) - num_removed - kept.sum(0)
    if stays.any():
        equal = scores == limit
        kept |= equal & (equal.cumsum(0) <= stays)
    return kept
