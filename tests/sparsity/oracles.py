# SPDX-License-Identifier: Apache-2.0
"""What the hessian method should find, the slow way: one weight, one row, one set at a time, in float64."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def correlated_gram(size: int, seed: int = 0, kind: str = "decaying", dtype: torch.dtype = torch.float64) -> Tensor:
    """Sums of products of inputs whose spectrum falls, or that a ReLU gave, or that differ in size by far."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    mix = torch.arange(1, size + 1, dtype=torch.float64).pow(-0.7).unsqueeze(1) * mix
    x = torch.randn(4 * size + 8, size, generator=generator, dtype=torch.float64) @ mix
    if kind == "relu":
        x = (x * size**0.5 + 0.3).relu()
    if kind == "outliers":
        x = x * torch.randn(size, generator=generator, dtype=torch.float64).exp()
    return (x.t() @ x).to(dtype)


def damped_gram(gram: Tensor, damping: float = 0.01) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Of all outputs, relative to them."""
    lost, whole = (weight - new).flatten(1).double(), weight.flatten(1).double()
    return float(((lost @ gram.double()) * lost).sum() / ((whole @ gram.double()) * whole).sum())


def refit_row(row: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Least squares on the columns that a row keeps."""
    new = torch.zeros_like(row)
    stays = kept.nonzero().squeeze(1)
    new[stays] = torch.linalg.solve(gram[stays][:, stays], gram[stays] @ row)
    return new


def best_row(row: Tensor, gram: Tensor, masks: Iterable[Tensor]) -> tuple[float, Tensor]:
    """The lowest error of a row over all these masks, each refitted, and the new row."""
    found = [refit_row(row, kept, gram) for kept in masks]
    errors = [float((row - new) @ gram @ (row - new)) for new in found]
    return min(errors), found[errors.index(min(errors))]


def textbook_row(
    row: Tensor, gram: Tensor, runs: Iterable[tuple[int, int]], choose: Callable[[int, int], Tensor]
) -> Tensor:
    """Optimal brain surgeon on one row: weights go one at a time; those of earlier runs are fixed.

    ``choose`` gives the mask of a run. Each removal takes the inverse over the weights that may still change.
    """
    row = row.clone()
    free = list(range(len(row)))
    for start, stop in runs:
        kept = choose(start, stop)
        for column in range(start, stop):
            if kept[column - start]:
                continue
            index = torch.tensor(free)
            inverse = torch.linalg.inv(gram[index][:, index])
            place = free.index(column)
            row[index] -= row[column] / inverse[place, place] * inverse[:, place]
            row[column] = 0
            free.remove(column)
        free = [column for column in free if column >= stop]
    return row
