# SPDX-License-Identifier: Apache-2.0
"""n of every m neighbours stay, chosen by what their removal costs."""

import torch
from torch import Tensor

from fxslim.patterns import NM
from fxslim.sparsity.column_order import Run
from fxslim.sparsity.column_updates import Columns
from fxslim.sparsity.group_choices import GroupChoices, has_few_sets, invert_factors


def remove_along_inputs(columns: Columns, factor: Tensor, runs: list[Run], pattern: NM, block_size: int) -> Tensor:
    """The mask, as columns; each run of them is a group."""
    mask = torch.ones_like(columns.values, dtype=torch.bool)
    choices = {size: _choices(factor, runs, size, pattern) for size in {stop - start for start, stop in runs}}
    turn = dict.fromkeys(choices, 0)
    for start, stop in columns.walk(runs, block_size):
        size, values = stop - start, columns.values[start:stop]
        table = choices[size]
        if isinstance(table, GroupChoices):
            mask[start:stop], new = table.choose(turn[size], values)
            columns.settle(start, stop, new)
        elif table is None:
            columns.settle(start, stop, values.clone())
        else:
            mask[start:stop] = pattern.mask((values.square() / table[turn[size]]).t()).t()
            columns.settle_each(start, stop, mask[start:stop])
        turn[size] += 1
    return mask


def remove_along_outputs(columns: Columns, runs: list[Run], pattern: NM, block_size: int) -> Tensor:
    """The mask, as columns; each is chosen by itself."""
    mask = torch.ones_like(columns.values, dtype=torch.bool)
    for start, stop in columns.walk(runs, block_size):
        values = columns.values[start:stop]
        mask[start:stop] = pattern.mask(values.abs().t()).t()
        columns.settle(start, stop, values * mask[start:stop])
    return mask


def _choices(factor: Tensor, runs: list[Run], size: int, pattern: NM) -> GroupChoices | Tensor | None:
    """For all groups of a size: what each set costs; for large ones a cost of each entry; None where nothing goes."""
    num_removed = size - pattern.n
    if num_removed <= 0:
        return None
    starts = torch.tensor([start for start, stop in runs if stop - start == size], device=factor.device)
    index = starts.unsqueeze(1) + torch.arange(size, device=factor.device)
    factors = factor[index.unsqueeze(2), index.unsqueeze(1)]
    if has_few_sets(size, num_removed):
        return GroupChoices(factors, num_removed)
    return invert_factors(factors).diagonal(dim1=1, dim2=2).unsqueeze(2)
