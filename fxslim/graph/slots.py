# SPDX-License-Identifier: Apache-2.0
"""Slots: where channels live in parameters and buffers."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxslim.graph.labels import Ids

# A state by name, and one of its dims.
SlotKey = tuple[str, int]


def owner(name: str) -> str:
    """The layer that a parameter or buffer belongs to; a parametrization is part of its layer.

    >>> owner("a.conv.weight"), owner("a.conv.parametrizations.weight.original")
    ('a.conv', 'a.conv')
    """
    layer, inside, _ = f".{name}".partition(".parametrizations.")
    return layer[1:] if inside else name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One dim of one parameter or buffer: entry i belongs to the channel labelled ``ids[i]``.

    ``blocks`` > 1: the dim is cut differently for each block of output channels (grouped convolution);
    ids then has the labels of all blocks, one after the other.
    """

    name: str
    dim: int
    ids: Ids
    blocks: int = 1
    # A producer makes the channel, a consumer reads it, a follower has one value for each (norms, ...).
    role: str = "follower"

    @property
    def key(self) -> SlotKey:
        return self.name, self.dim


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One use of a layer that costs arithmetic: ``macs`` at batch 1 with all channels."""

    name: str
    macs: int
    # Slots whose share of kept entries each multiplies the cost.
    factors: tuple[SlotKey, ...]


class Place(Protocol):
    """A slot, or anything else that names one dim of a tensor and its blocks."""

    @property
    def dim(self) -> int: ...

    @property
    def blocks(self) -> int: ...


def entry_sums(values: Tensor, place: Place) -> Tensor:
    """The sum over all else, in float64, for each entry of a slot.

    >>> entry_sums(torch.ones(2, 3), Slot(name="fc.weight", dim=1, ids=None))
    tensor([2., 2., 2.], dtype=torch.float64)
    """
    if place.blocks > 1:
        values = values.reshape(place.blocks, -1, *values.shape[1:])
        return values.sum([1, *range(3, values.dim())], dtype=torch.float64).flatten()
    others = [d for d in range(values.dim()) if d != place.dim]
    return values.sum(others, dtype=torch.float64) if others else values.double()
