# SPDX-License-Identifier: Apache-2.0
"""Sums and maxima over the slice of a weight that belongs to each entry of a slot, in float64 on the CPU."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.graph.slots import Slot
from fxslim.pruning.importance.criterion import Context

# Changes values in place.
InPlace = Callable[[Tensor], Tensor]

# Rows of a weight are summed in pieces that stay in the cache.
PIECE = 1 << 18


class Sums:
    """Sums of a function of w over all but one dim, in float64 on the CPU, made in one pass over each weight."""

    def __init__(self, state: Tensor, function: InPlace, blocks: int = 1) -> None:
        self.state, self.function = state.detach().cpu(), function
        rows = self.state.reshape(self.state.shape[0], -1)
        self.by_row = torch.empty(len(rows), dtype=torch.float64)
        self.by_column = torch.zeros(blocks, rows.shape[1], dtype=torch.float64)
        per_block = len(rows) // blocks
        step = max(1, min(PIECE // max(rows.shape[1], 1), per_block))
        scratch = torch.empty(step, rows.shape[1], dtype=torch.float64)
        for block in range(blocks):
            for start in range(block * per_block, (block + 1) * per_block, step):
                stop = min(start + step, (block + 1) * per_block)
                piece = function(scratch[: stop - start].copy_(rows[start:stop]))
                # Products with ones are the fastest sums there are.
                torch.mv(piece, piece.new_ones(piece.shape[1]), out=self.by_row[start:stop])
                self.by_column[block].addmv_(piece.t(), piece.new_ones(len(piece)))

    def of(self, slot: Slot) -> np.ndarray:
        """One sum for each entry of a slot."""
        if slot.dim == 0:
            return self.by_row.numpy()
        if slot.dim == 1:
            return self.by_column.reshape(slot.blocks * self.state.shape[1], -1).sum(1).numpy()
        others = [d for d in range(self.state.dim()) if d != slot.dim]
        return self.function(self.state.to(torch.float64, copy=True)).sum(others).numpy()


def summed(context: Context, slots: Iterable[Slot], function: InPlace) -> Iterator[tuple[Slot, np.ndarray]]:
    """For each slot the sums over the slices of its entries; each weight is read once."""
    by_name: dict[str, list[Slot]] = {}
    for slot in slots:
        by_name.setdefault(slot.name, []).append(slot)
    for name, mine in by_name.items():
        sums = Sums(context.values_of(name), function, max(slot.blocks for slot in mine))
        for slot in mine:
            values = sums.of(slot)
            check_finite(name, values)
            yield slot, values


def slices(state: Tensor, slot: Slot) -> Tensor:
    """A matrix with a row for each entry of a slot: the part of the weight that goes with it.

    >>> slices(torch.arange(6).view(2, 3), Slot(name="fc.weight", dim=1, ids=None))
    tensor([[0, 3],
            [1, 4],
            [2, 5]])
    """
    if slot.blocks > 1:
        blocked = state.reshape(slot.blocks, -1, *state.shape[1:]).transpose(1, 2)
        return blocked.reshape(slot.blocks * state.shape[1], -1)
    return state.movedim(slot.dim, 0).reshape(state.shape[slot.dim], -1)


def maxima(context: Context, slot: Slot) -> np.ndarray:
    """The largest magnitude in the slice of each entry of a slot."""
    values = slices(context.values_of(slot.name), slot).abs().amax(1).to("cpu", torch.float64).numpy()
    check_finite(slot.name, values)
    return values


def check_finite(name: str, values: np.ndarray) -> None:
    """Weights that are not numbers can't be ranked."""
    if not np.isfinite(values).all():
        raise ConfigError(
            f"importance needs finite values, but {name} has NaN or infinity in "
            f"{int((~np.isfinite(values)).sum())} of {len(values)} channels: mend the weights or use 'random'"
        )
