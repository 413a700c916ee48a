# SPDX-License-Identifier: Apache-2.0
"""Parameters that a forward uses directly (position tables, layer scales): where do channels live in them?"""

from collections.abc import Iterable, Mapping

from fxslim.graph.labels import Freeze, Ids
from fxslim.graph.slots import Slot


def settle_entries(entries: Mapping[str, Ids], slots: Iterable[Slot], classes: Ids) -> tuple[list[Slot], list[Freeze]]:
    """Slots of the parameters whose entries turned out to be one channel along all dims but one; others freeze.

    >>> import numpy as np
    >>> found, frozen = settle_entries({"table": np.array([[1, 2], [3, 4]])}, [], np.array([0, 1, 2, 1, 2]))
    >>> found[0].dim, found[0].ids.tolist(), frozen
    (1, [1, 2], [])
    """
    settled, freezes = [], []
    of_state: dict[str, list[Slot]] = {}
    for slot in slots:
        of_state.setdefault(slot.name, []).append(slot)
    for name, ids in entries.items():
        found = classes[ids]
        dims = [d for d in range(found.ndim) if (found != found.take([0], axis=d)).any()]
        if len(dims) == 1 and name not in of_state:
            line = found.swapaxes(0, dims[0]).reshape(found.shape[dims[0]], -1)[:, 0]
            settled.append(Slot(name=name, dim=dims[0], ids=line))
            continue
        reason = f"{name} is used directly" + (", and as a weight" if name in of_state else "")
        freezes += [Freeze(ids=i.reshape(-1), reason=reason) for i in (ids, *(s.ids for s in of_state.get(name, [])))]
    return settled, freezes
