# SPDX-License-Identifier: Apache-2.0
"""Whole blocks go, chosen by what their removal costs; what stays of their filters is fitted anew."""

import torch
from torch import Tensor

from fxslim.patterns import Block
from fxslim.sparsity.damped_factor import factor_damped


def remove_blocks(rows: Tensor, products: Tensor, damping: float, pattern: Block, shape: torch.Size) -> Tensor:
    """The mask of a weight of this shape, as rows; these get their new values in place.

    All blocks are chosen at once, each by what an entry of it costs if the block goes alone. The filters of a block
    read the same channels, so the best values of what stays are those of one linear system. (To fit and choose again
    after every part of the blocks costs as much each time, and ends at most a few per cent better.)
    """
    damped, lower = factor_damped(products, damping)
    inverse = torch.cholesky_inverse(lower)
    parts = column_parts(shape, pattern)
    filters = torch.arange(len(rows), device=rows.device).split(pattern.cout)
    cost = torch.stack([_costs(rows, inverse, part, pattern.cout) for part in parts], 1)
    # Of equal ones the later go.
    order = cost.flatten().flip(0).argsort(stable=True)
    kept = torch.ones_like(order, dtype=torch.bool)
    kept[order[: pattern.num_removed(tuple(shape))]] = False
    mask = torch.ones_like(rows, dtype=torch.bool)
    for some, kept_parts in zip(filters, kept.flip(0).view(cost.shape).tolist(), strict=True):
        removed = [part for part, stays in zip(parts, kept_parts, strict=True) if not stays]
        if removed:
            mask[some[:, None], torch.cat(removed)] = False
            rows[some] = fit_rest(rows[some], damped, inverse, mask[some[0]])
    return mask


def column_parts(shape: tuple[int, ...], pattern: Block) -> list[Tensor]:
    """The columns of each block, in the order of ``Block.any_in_block``.

    >>> column_parts((1, 3, 2), Block(cin=2, cout=1))
    [tensor([0, 2]), tensor([1, 3]), tensor([4]), tensor([5])]
    """
    columns = torch.arange(torch.Size(shape[1:]).numel()).view(shape[1], -1)
    parts = columns.split(pattern.cin)
    if not pattern.per_position:
        return [part.flatten() for part in parts]
    return [part[:, position] for part in parts for position in range(part.shape[1])]


def fit_rest(rows: Tensor, damped: Tensor, inverse: Tensor, kept: Tensor) -> Tensor:
    """The rows nearest to these, as their outputs count, that are 0 where not ``kept``; by the smaller linear system.

    >>> products = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> fit_rest(torch.tensor([[1.0, 1.0]]), products, products.inverse(), torch.tensor([True, False]))
    tensor([[1.5000, 0.0000]])
    """
    stays, goes = kept.nonzero().squeeze(1), (~kept).nonzero().squeeze(1)
    if len(goes) < len(stays):
        _, lower = factor_damped(inverse[goes[:, None], goes], 0.0)
        new = rows - torch.cholesky_solve(rows[:, goes].t(), lower).t() @ inverse[goes]
        new[:, goes] = 0
        return new
    _, lower = factor_damped(damped[stays[:, None], stays], 0.0)
    new = torch.zeros_like(rows)
    new[:, stays] = torch.cholesky_solve(damped[stays] @ rows.t(), lower).t()
    return new


def _costs(rows: Tensor, inverse: Tensor, part: Tensor, cout: int) -> Tensor:
    """Of the blocks of all filters at some columns, for each entry: ``w @ inv(inverse of these columns) @ w``."""
    block = rows[:, part].double()
    solved = torch.linalg.solve(inverse[part[:, None], part].double(), block.t()).t()
    costs = torch.stack([each.sum() for each in (block * solved).sum(1).split(cout)])
    sizes = torch.tensor([len(each) for each in block.split(cout)], device=rows.device) * len(part)
    return costs / sizes
