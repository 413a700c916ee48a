# SPDX-License-Identifier: Apache-2.0
"""Moves the weights that stay towards least squares, where each row keeps other ones."""

import torch
from torch import Tensor


def improve_kept(new: Tensor, old: Tensor, mask: Tensor, products: Tensor, block_size: int) -> Tensor:
    """New columns, as rows: each kept weight once at its best beside all others as they are then.

    The error ``(old - new) @ products @ (old - new)`` of no row rises.

    >>> products = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> improve_kept(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), torch.tensor([[True], [False]]), products, 128)
    tensor([[1.5000],
            [0.0000]])
    """
    change, strength = old - new, products.diagonal().unsqueeze(1)
    for start in range(0, len(change), block_size):
        block = slice(start, min(start + block_size, len(change)))
        slope = products[block] @ change
        steps = torch.empty_like(slope)
        for place in range(len(slope)):
            column = start + place
            if place:
                slope[place : place + 1].addmm_(products[column : column + 1, start:column], steps[:place], alpha=-1)
            torch.div(slope[place], strength[column], out=steps[place]).mul_(mask[column])
        change[block] -= steps
    return old - change
