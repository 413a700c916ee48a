# SPDX-License-Identifier: Apache-2.0
"""Goes through the columns of a weight from the first to the last; later ones make up for what earlier ones lost."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Run = tuple[int, int]


class Columns:
    """The columns of a weight, given as rows of ``values``: new ones up to where the walk is, then old ones.

    ``factor`` is the upper R of the products ``R @ R.t()`` of the inputs. Column j of the error ``(old - new) @ R``
    holds no weights after j, so the best value beside given earlier ones is the one that makes it 0:
    ``old + (old - new of earlier ones) @ R[:, j] / R[j, j]``. No inverse is needed. To remove w from column j then
    costs ``(w * R[j, j])**2``, where all later columns make up for it.

    >>> columns = Columns(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    >>> for start, stop in columns.walk([(0, 1), (1, 2)], 128):
    ...     columns.settle(start, stop, columns.values[start:stop] * start)
    >>> columns.values
    tensor([[0.],
            [2.]])
    """

    def __init__(self, values: Tensor, factor: Tensor) -> None:
        self.values = values.clone()
        self.scale = factor.diagonal().unsqueeze(1)
        self._change = torch.empty_like(self.values)
        self._spread = factor / factor.diagonal()
        self._first, self._old = 0, self.values[:0]

    def walk(self, runs: Sequence[Run], block_size: int) -> Iterator[Run]:
        """Runs of columns (start, stop), one after another, as what was settled before leaves them.

        Changes come from all earlier blocks, of at most so many columns, in one product for each block.
        """
        for block in _blocks(runs, block_size):
            self._first, stop = block[0][0], block[-1][1]
            self._old = self.values[self._first : stop].clone()
            self._catch_up(self._first, stop, 0)
            for run in block:
                self._catch_up(*run, self._first)
                yield run

    def settle(self, start: int, stop: int, new: Tensor) -> None:
        """These are the new values of these columns."""
        torch.sub(self._old[start - self._first : stop - self._first], new, out=self._change[start:stop])
        self.values[start:stop] = new

    def settle_each(self, start: int, stop: int, mask: Tensor) -> None:
        """Keeps what ``mask`` says of these columns; each makes up for those before it."""
        for column in range(start, stop):
            self._catch_up(column, column + 1, start)
            kept = mask[column - start : column - start + 1]
            self.settle(column, column + 1, self.values[column : column + 1] * kept)

    def _catch_up(self, start: int, stop: int, since: int) -> None:
        if since < start:
            self.values[start:stop].addmm_(self._spread[since:start, start:stop].t(), self._change[since:start])


def _blocks(runs: Sequence[Run], size: int) -> Iterator[Sequence[Run]]:
    """Whole runs together, at most so many columns; a longer run alone.

    >>> list(_blocks([(0, 2), (2, 4), (4, 9)], 4))
    [[(0, 2), (2, 4)], [(4, 9)]]
    """
    first = 0
    for number in range(1, len(runs) + 1):
        if number == len(runs) or runs[number][1] - runs[first][0] > size:
            yield runs[first:number]
            first = number
