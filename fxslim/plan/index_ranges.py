# SPDX-License-Identifier: Apache-2.0
"""Kept indices as compact text: ``0-3,7,9-12``."""

from collections.abc import Sequence

from fxslim.errors import PlanError


def pack_ranges(indices: Sequence[int]) -> str:
    """Indices in their order, runs as ranges.

    >>> pack_ranges([0, 1, 2, 3, 7, 9, 10])
    '0-3,7,9-10'
    """
    parts: list[str] = []
    start = previous = None
    for i in [*indices, None]:
        if start is not None and (i is None or i != previous + 1):  # type: ignore[operator]
            parts.append(str(start) if start == previous else f"{start}-{previous}")
            start = i
        elif start is None:
            start = i
        previous = i
    return ",".join(parts)


def unpack_ranges(text: str, size: int) -> tuple[int, ...]:
    """The indices, below ``size``, of a text that ``pack_ranges`` wrote.

    >>> unpack_ranges("0-3,7", 8)
    (0, 1, 2, 3, 7)
    """
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise PlanError(f"kept indices {text!r} are not ranges such as '0-3,7'")
        if not int(first) <= int(last or first) < size:
            raise PlanError(f"kept indices {text!r} are not between 0 and {size - 1}")
        indices += range(int(first), int(last or first) + 1)
    if len(indices) != len(set(indices)):
        raise PlanError(f"kept indices {text!r} name an index twice")
    return tuple(indices)
