# SPDX-License-Identifier: Apache-2.0
"""Any entries go, chosen by what their removal costs."""

import torch
from torch import Tensor

from fxslim.patterns import Unstructured
from fxslim.sparsity.column_updates import Columns

# Columns that are chosen together. Fewer see more of what was removed before; but an output needs some to choose from.
_TOGETHER, _TOGETHER_PER_OUTPUT = 8, 32


def remove_entries(columns: Columns, pattern: Unstructured, block_size: int) -> Tensor:
    """The mask, as columns.

    How many go where follows from the costs at the start: early columns are cheap, as all later ones make up for
    them. Which ones go is decided by the costs when their turn comes.
    """
    removed = ~pattern.mask((columns.values * columns.scale).square_().t())
    mask = torch.ones_like(columns.values, dtype=torch.bool)
    size = min(_TOGETHER_PER_OUTPUT if pattern.per_output else _TOGETHER, block_size)
    runs = [(start, min(start + size, len(mask))) for start in range(0, len(mask), size)]
    for start, stop in columns.walk(runs, block_size):
        here = removed[:, start:stop]
        cost = (columns.values[start:stop] * columns.scale[start:stop]).square_()
        if pattern.per_output:
            mask[start:stop] = keep_highest(cost, here.sum(1))
        else:
            mask[start:stop] = keep_highest(cost.view(-1, 1), here.sum().view(1)).view(cost.shape)
        columns.settle_each(start, stop, mask[start:stop])
    return mask


def keep_highest(scores: Tensor, num_removed: Tensor) -> Tensor:
    """All but so many of each column, which may differ; of equal ones the later go.

    >>> keep_highest(torch.tensor([[1.0, 3.0], [1.0, 2.0]]), torch.tensor([1, 0]))
    tensor([[ True,  True],
            [False,  True]])
    """
    order = scores.flip(0).argsort(dim=0, stable=True)
    places = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    return torch.empty_like(scores, dtype=torch.bool).scatter_(0, order, places >= num_removed).flip(0)
