# SPDX-License-Identifier: Apache-2.0
"""Solves normal equations."""

import torch
from torch import Tensor

# Of the number of unknowns times the rounding of float64: smaller pivots are rounding themselves.
_PIVOT = 10.0
# Of the rounding of the numbers that the sums were made from: what layer norms leave of a dependency is of this size,
# and weights that use it are a thousand times too large to train on.
_NOISE = 8.0


def solve_normal(gram: Tensor, right: Tensor, made_from: torch.dtype = torch.float64) -> Tensor:
    """``gram @ x = right`` in float64, where gram is a matrix of products; near 0 in directions that it does not see.

    ``made_from``: what the data were computed in. Columns are brought to length 1 first. Where what remains of a
    column beside the ones before it is rounding only, a ridge of that size is added, and ten times as much until it goes.

    >>> gram = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 0.0]]).double()
    >>> solve_normal(gram, torch.tensor([[4.0], [4.0], [0.0]]).double()).flatten().round(decimals=6)
    tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    length = gram.diagonal().clamp(min=0).sqrt()
    length = torch.where(length > 0, length, 1.0).unsqueeze(1)
    unit, scaled = gram / length / length.t(), right / length
    least = max(_PIVOT * max(1, len(gram)) * torch.finfo(torch.float64).eps, _NOISE * torch.finfo(made_from).eps)
    ridge = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(unit)
        if not failed and (not len(factor) or float(factor.diagonal().min()) ** 2 >= max(ridge, least) / 2):
            return torch.cholesky_solve(scaled, factor) / length
        more = max(least, 10 * ridge) - ridge
        unit.diagonal().add_(more)
        ridge += more
