# SPDX-License-Identifier: Apache-2.0
"""Which entries of a group go: the set that costs least once all others have made up for it."""

from itertools import combinations
from math import comb

import torch
from torch import Tensor

MOST_SETS = 70


def has_few_sets(size: int, num_removed: int) -> bool:
    """Whether a group has so few sets of entries to remove that all are compared.

    >>> has_few_sets(8, 4), has_few_sets(16, 8)
    (True, False)
    """
    return comb(size, num_removed) <= MOST_SETS


def invert_factors(factors: Tensor) -> Tensor:
    """The inverses of ``R @ R.t()``, for many small upper R.

    >>> invert_factors(torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]))
    tensor([[[0.2500, 0.0000],
             [0.0000, 1.0000]]])
    """
    one = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    upper = torch.linalg.solve_triangular(factors, one, upper=True)
    return upper.mT @ upper


class GroupChoices:
    """Every set of ``num_removed`` out of a group's columns: what it costs a row, and what becomes of the others.

    ``factors`` holds a group's part of the upper R, for many groups of one size. With the inverse H of
    ``R @ R.t()``, a set S costs ``w_S @ inv(H_SS) @ w_S``; the others become ``w - w_S @ inv(H_SS) @ H_S``. Both are
    the same for all rows, so they are made once for each set.

    >>> choices = GroupChoices(torch.eye(2).unsqueeze(0), 1)
    >>> choices.choose(0, torch.tensor([[1.0, 4.0], [2.0, 3.0]]))
    (tensor([[False,  True],
            [ True, False]]), tensor([[0., 4.],
            [2., 0.]]))
    """

    def __init__(self, factors: Tensor, num_removed: int) -> None:
        size, device = factors.shape[-1], factors.device
        inverse = invert_factors(factors.double())
        # Of sets that cost the same the one with the latest entries goes.
        sets = torch.tensor(list(combinations(range(size), num_removed))[::-1], device=device)
        entries = torch.eye(size, dtype=inverse.dtype, device=device)
        # sets x removed x size: picks a set's entries.
        picks = entries[sets]
        within = inverse[:, sets.unsqueeze(2), sets.unsqueeze(1)]
        solved = torch.linalg.solve(within, torch.cat([picks.expand(len(within), -1, -1, -1), inverse[:, sets]], -1))
        cost, lost = (picks.mT @ solved).split(size, -1)
        self._kept = (picks.sum(1) == 0).t().contiguous()
        self._first, self._second = torch.triu_indices(size, size, device=device)
        # w_i * w_j stands at (i, j) and (j, i).
        twice = torch.where(self._first == self._second, 1, 2)
        self._costs = (cost[..., self._first, self._second] * twice).to(factors.dtype)
        maps = (entries - lost).mT * self._kept.t().unsqueeze(2)
        self._maps = maps.flatten(2).mT.contiguous().to(factors.dtype)

    def choose(self, group: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mask and new values of a group, from its columns as rows of ``values``."""
        products = values.index_select(0, self._first).mul_(values.index_select(0, self._second))
        # Sets last, and min: the smallest along another dim, and argmin, are several times slower.
        chosen = (products.t() @ self._costs[group].t()).min(1).indices
        maps = self._maps[group].index_select(1, chosen).view(len(values), *values.shape)
        return self._kept.index_select(1, chosen), maps.mul_(values).sum(1)
