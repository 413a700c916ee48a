# SPDX-License-Identifier: Apache-2.0
"""Progress bars for long work: shown on a terminal, silent anywhere else."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, total: int | None = None, progress: bool = True
) -> Iterator[Item]:
    """Yield ``items`` behind a progress bar on stderr.

    ``progress=False``, or a stderr that is no terminal, silences it.

    >>> sum(track([1, 2, 3], "adding", progress=False))
    6
    """
    if not (progress and sys.stderr is not None and sys.stderr.isatty()):
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, desc=description, total=total, file=sys.stderr, leave=False)
