# SPDX-License-Identifier: Apache-2.0
"""Distances between the channels of a slot; a head is compared with a head, entry by entry."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fxslim.graph.slots import Slot
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.slot_sums import check_finite, slices

# So many elements are turned to float64 at a time.
PIECE = 1 << 22

# Vectors as short as this are subtracted, longer ones multiplied, which is faster and less exact.
FEW = 4

# Squared distances below this share of the squared norms are what rounding leaves of 0.
NOTHING = 1e-12


def class_vectors(context: Context, slot: Slot) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Classes of equally many entries (their places in the slot's holding), and a vector for each."""
    rows = slices(context.values_of(slot.name), slot)
    check_finite(slot.name, rows.double().sum(1).cpu().numpy())
    holding = context.holding(slot)
    for count, entries in holding.entries().items():
        chosen = np.flatnonzero(holding.counts == count)
        yield chosen, rows[torch.from_numpy(entries.ravel()).to(rows.device)].reshape(len(chosen), -1)


def squared_distances(vectors: Tensor) -> np.ndarray:
    """Squared Euclidean distances between all vectors; equal ones have exactly 0.

    >>> squared_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist()
    [[0.0, 25.0], [25.0, 0.0]]
    """
    if vectors.shape[1] <= FEW:
        few = vectors.detach().to("cpu", torch.float64)
        return sum((column[:, None] - column[None, :]).square() for column in few.t()).float().double().numpy()
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for piece in vectors.split(max(1, PIECE // len(vectors)), dim=1):
        values = piece.detach().to("cpu", torch.float64)
        products.addmm_(values, values.t())
    norms = products.diagonal()
    both = norms[:, None] + norms[None, :]
    distances = torch.sub(both, products, alpha=2)
    distances.masked_fill_(distances <= both.mul_(NOTHING), 0.0)
    # Symmetric, and rounded, so that equal distances are equal: the order of a product's terms is not ours.
    return ((distances + distances.t()) / 2).float().double().numpy()
