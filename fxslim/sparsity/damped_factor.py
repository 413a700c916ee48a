# SPDX-License-Identifier: Apache-2.0
"""Triangular factors of matrices of products, whatever their rank."""

import math

import torch
from torch import Tensor


def scale_products(gram: Tensor) -> Tensor:
    """A copy whose diagonal has a mean of 1; inputs that were always 0 are no part of that, and get 1.

    >>> scale_products(torch.tensor([[2.0, 1.0, 0.0], [1.0, 6.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([[0.5000, 0.2500, 0.0000],
            [0.2500, 1.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    alive = gram.diagonal() > 0
    if not alive.any():
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scaled = gram / gram.diagonal()[alive].mean()
    if not alive.all():
        scaled *= alive.unsqueeze(1) & alive
        scaled.diagonal().add_((~alive).to(scaled.dtype))
    return scaled


def factor_damped(products: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``products + damping * I`` and its lower factor; ten times more damping until there is one.

    >>> damped, lower = factor_damped(torch.ones(2, 2), 0.0)
    >>> torch.equal(damped, torch.ones(2, 2)), bool(torch.allclose(lower @ lower.t(), damped))
    (False, True)
    """
    own = products.diagonal()
    damped = products.clone()
    rounding = torch.finfo(products.dtype).eps
    while True:
        assert math.isfinite(damping), "no damping helps: the products are not finite"
        torch.add(own, damping, out=damped.diagonal())
        lower, failed = torch.linalg.cholesky_ex(damped)
        # A pivot as small as its own rounding says nothing.
        if not failed and (lower.diagonal().square() > rounding * own).all():
            return damped, lower
        damping = max(rounding * len(products), 10 * damping)
