# SPDX-License-Identifier: Apache-2.0
"""Whole blocks go, chosen by what their removal costs; what stays of their filters is fitted anew."""

import torch
from torch import Tensor

from fxslim.patterns import Block
from fxslim.sparsity.damped_factor import factor_damped

# Up to so many blocks they go in rounds: with more, choosing anew is slow, and gains at most a few per cent.
_FEW_BLOCKS, _MOST_ROUNDS = 256, 8


def remove_blocks(
    rows: Tensor, products: Tensor, damping: float, pattern: Block, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """New rows, and their mask, of a weight of this shape.

    A block is chosen by what each entry of it costs if it goes alone, beside the blocks that went in earlier rounds.
    The filters of a block read the same channels, so the best values of what stays are those of one linear system.
    """
    damped, lower = factor_damped(products, damping)
    inverse = torch.cholesky_inverse(lower)
    parts = [part.to(rows.device) for part in column_parts(shape, pattern)]
    filters = torch.arange(len(rows), device=rows.device).split(pattern.cout)
    own = [inverse[part[:, None], part] for part in parts]
    cost = torch.stack([costs(rows[:, part], own[at], pattern.cout) for at, part in enumerate(parts)], 1)
    num_removed = pattern.num_removed(tuple(shape))
    rounds = min(num_removed, _MOST_ROUNDS) if cost.numel() <= _FEW_BLOCKS else 1
    new, mask = rows.clone(), torch.ones_like(rows, dtype=torch.bool)
    for number in range(1, rounds + 1):
        num_gone = int(cost.isinf().sum())
        chosen = _lowest(cost, num_removed * number // rounds - num_gone)
        cost[chosen] = torch.inf
        for index in chosen.any(1).nonzero().flatten().tolist():
            some = filters[index]
            gone = [part for part, infinite in zip(parts, cost[index].isinf().tolist(), strict=True) if infinite]
            mask[some[:, None], torch.cat(gone)] = False
            new[some] = fit_rest(rows[some], damped, inverse, mask[some[0]])
            if number < rounds:
                known = known_from(inverse, (~mask[some[0]]).nonzero().squeeze(1))
                for place in (~cost[index].isinf()).nonzero().flatten().tolist():
                    part = parts[place]
                    rest = own[place] - known[:, part].t() @ known[:, part]
                    cost[index, place] = costs(new[some[:, None], part], rest, len(some)).squeeze()
    return new, mask


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


def known_from(inverse: Tensor, goes: Tensor) -> Tensor:
    """F, where ``inverse - F.t() @ F`` is the inverse of the products without the columns that go.

    >>> inverse = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).inverse()
    >>> known = known_from(inverse, torch.tensor([1]))
    >>> (inverse - known.t() @ known).round(decimals=5).abs()
    tensor([[0.2500, 0.0000],
            [0.0000, 0.0000]])
    """
    _, lower = factor_damped(inverse[goes[:, None], goes], 0.0)
    return torch.linalg.solve_triangular(lower, inverse[goes], upper=False)


def costs(columns: Tensor, inverse: Tensor, cout: int) -> Tensor:
    """Of each block of filters, for each entry: ``w @ inv(inverse) @ w``; inverse is that of all, at these columns.

    >>> costs(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.25]]), 1)
    tensor([ 4., 36.], dtype=torch.float64)
    """
    _, lower = factor_damped(inverse.double(), 0.0)
    half = torch.linalg.solve_triangular(lower, columns.double().t(), upper=False)
    return torch.stack([each.square().mean() for each in half.split(cout, 1)])


def _lowest(cost: Tensor, num: int) -> Tensor:
    """Where the lowest are; of equal ones the later."""
    order = cost.flatten().flip(0).argsort(stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    chosen[order[:num]] = True
    return chosen.flip(0).view(cost.shape)
