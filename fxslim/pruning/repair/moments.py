# SPDX-License-Identifier: Apache-2.0
"""Sums of products of what a layer reads: all that least squares needs to know of the data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxslim.pruning.repair.solving import solve_normal

# Rows that are widened to float64 at a time.
_STEP = 1024


def _with_ones(rows: Tensor) -> Tensor:
    rows = rows.double()
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)


def add_products(into: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``into`` plus the products of columns, each side with a column of ones, in float64; groups x rows x columns.

    >>> add_products(None, torch.tensor([[[2.0]]]), torch.tensor([[[3.0]]]))
    tensor([[[6., 2.],
             [3., 1.]]], dtype=torch.float64)
    """
    if into is None:
        into = left.new_zeros(left.shape[0], left.shape[2] + 1, right.shape[2] + 1, dtype=torch.float64)
    for start in range(0, left.shape[1], _STEP):
        a = _with_ones(left[:, start : start + _STEP])
        b = a if right is left else _with_ones(right[:, start : start + _STEP])
        into.baddbmm_(a.transpose(1, 2), b)
    return into


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over the sampled rows: of what the pruned layer reads with itself, and with what the original read.

    ``kept`` is groups x (k + 1) x (k + 1), ``cross`` groups x (k + 1) x (columns + 1); the last is a column of ones.
    """

    kept: Tensor
    cross: Tensor

    @classmethod
    def of_original(cls, products: Tensor, kept: Tensor) -> "Moments":
        """For any kept columns, from the products of all columns of the original: the pruned layer reads its part."""
        ones = torch.full((len(kept), 1), products.shape[2] - 1, dtype=torch.int64)
        index = torch.cat([kept, ones], 1).to(products.device)
        cross = torch.stack([group[columns] for group, columns in zip(products, index, strict=True)])
        inside = torch.stack([rows[:, columns] for rows, columns in zip(cross, index, strict=True)])
        return cls(kept=inside, cross=cross)

    def by_channel(self, taps: int) -> "Moments":
        """Those of channels, summed over their taps, which lie next to each other."""
        return Moments(kept=_over_taps(self.kept, taps), cross=_over_taps(self.cross, taps))

    @property
    def num_rows(self) -> int:
        return round(float(self.kept[0, -1, -1]))


def _over_taps(products: Tensor, taps: int) -> Tensor:
    """Entries of two channels at the same tap, summed; the ones count each tap.

    >>> _over_taps(torch.arange(9.0).view(1, 3, 3), 2)
    tensor([[[ 4.,  7.],
             [13., 16.]]])
    """
    groups, rows, columns = (products.shape[0], products.shape[1] // taps, products.shape[2] // taps)
    result = products.new_empty(groups, rows + 1, columns + 1)
    inner = products[:, :-1, :-1].reshape(groups, rows, taps, columns, taps)
    result[:, :-1, :-1] = inner.diagonal(dim1=2, dim2=4).sum(-1)
    result[:, -1, :-1] = products[:, -1, :-1].view(groups, columns, taps).sum(-1)
    result[:, :-1, -1] = products[:, :-1, -1].reshape(groups, rows, taps).sum(-1)
    result[:, -1, -1] = taps * products[:, -1, -1]
    return result


def refitted(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, full-size in float64, whose kept columns give the outputs nearest to those of all columns.

    ``weight`` is groups x outputs x columns x taps, ``bias`` groups x outputs; without one the fit has no intercept.
    Where the data leave a choice, the weights stay near to what they were.
    """
    weight, made_from = weight.double(), weight.dtype
    new_weight, new_bias = weight.clone(), None if bias is None else bias.double().clone()
    for g, columns in enumerate(kept.to(weight.device)):
        k = len(columns) + (bias is not None)
        gram = moments.kept[g, :k, :k]
        # What is left of the original when each kept column stands for itself.
        rest = moments.cross[g, :k, :-1].clone()
        rest[:, columns] -= gram[:, : len(columns)]
        if weight.shape[3] == 1:
            change = solve_normal(gram, rest @ weight[g, :, :, 0].t(), made_from).t().unsqueeze(2)
        else:
            change = torch.einsum("oct,kc->okt", weight[g], solve_normal(gram, rest, made_from))
        new_weight[g, :, columns] += change[:, : len(columns)]
        if new_bias is not None:
            new_bias[g] += change[:, -1].sum(1)
    return new_weight, new_bias
