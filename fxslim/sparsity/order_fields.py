# SPDX-License-Identifier: Apache-2.0
"""Orders of channels as plain data, and back: each order once, with the places that follow it."""

from collections.abc import Iterable
from typing import Any

from fxslim.errors import PlanError
from fxslim.graph.surgery.cutting import Cut
from fxslim.plan.cut_fields import Shapes, pack_cuts, unpack_cuts


def pack_orders(cuts: Iterable[Cut]) -> list[list[Any]]:
    """One list for each order: its indices, and the places.

    >>> pack_orders([Cut(name="a.weight", dim=0, keep=(1, 0)), Cut(name="b.weight", dim=1, keep=(1, 0))])
    [['1,0', [['a.weight', 0, 1, 'follower'], ['b.weight', 1, 1, 'follower']]]]
    """
    places: dict[str, list[list[Any]]] = {}
    for name, dim, blocks, keep, role in pack_cuts(cuts):
        places.setdefault(keep, []).append([name, dim, blocks, role])
    return [[keep, mine] for keep, mine in places.items()]


def unpack_orders(data: Iterable[Any], shapes: Shapes) -> tuple[Cut, ...]:
    """The cuts that ``pack_orders`` wrote."""
    fields = [[name, dim, blocks, keep, role] for keep, places in data for name, dim, blocks, role in places]
    cuts = unpack_cuts(fields, shapes)
    for cut in cuts:
        if cut.name not in shapes or len(cut.keep) != shapes[cut.name][cut.dim] * cut.blocks:
            raise PlanError(f"the order of {cut.name} has {len(cut.keep)} entries, not those of {shapes.get(cut.name)}")
    return cuts
