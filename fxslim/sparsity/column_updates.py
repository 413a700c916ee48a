# SPDX-License-Identifier: Apache-2.0
"""Goes through the columns of a weight from the first to the last; later ones make up for what earlier ones lost."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxslim.sparsity.column_order import Run


class Columns:
    """The columns of a weight, given as rows of ``values``: new ones up to where the walk is, then old ones.

    ``factor`` is the upper R of the products ``R @ R.t()`` of the inputs. Column j of the error ``(old - new) @ R``
    holds no weights after j, so the best values of some columns beside given earlier ones are those that make these
    columns of the error 0: ``old + (old - new of earlier ones) @ R[earlier, some] @ inv(R[some, some])``. No other
    inverse is needed. To remove w from column j then costs ``(w * R[j, j])**2``, as all later columns make up for it.

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
        self._factor = factor
        self._change = torch.empty_like(values)
        self._first = 0
        # Of the block where the walk is: old values, and the error that earlier columns leave in it.
        self._old = self._error = values[:0]

    def walk(self, runs: Sequence[Run], block_size: int) -> Iterator[Run]:
        """Runs of columns (start, stop), one after another, at their best values beside what was settled before.

        The changes of all earlier blocks, of at most so many columns, are one product for each block.
        """
        for block in _blocks(runs, block_size):
            self._first, stop = block[0][0], block[-1][1]
            self._old = self.values[self._first : stop].clone()
            self._error = self._factor[: self._first, self._first : stop].t() @ self._change[: self._first]
            for run in block:
                self._add_error(*run, self._first)
                self._make_up(*run)
                yield run

    def settle(self, start: int, stop: int, new: Tensor) -> None:
        """These are the new values of these columns."""
        torch.sub(self._old[self._here(start, stop)], new, out=self._change[start:stop])
        self.values[start:stop] = new

    def settle_each(self, start: int, stop: int, mask: Tensor) -> None:
        """Keeps what ``mask`` says of a run; each column makes up for those before it."""
        for column in range(start, stop):
            self._add_error(column, column + 1, start)
            self._make_up(column, column + 1)
            kept = mask[column - start : column - start + 1]
            self.settle(column, column + 1, self.values[column : column + 1] * kept)

    def _here(self, start: int, stop: int) -> slice:
        return slice(start - self._first, stop - self._first)

    def _add_error(self, start: int, stop: int, since: int) -> None:
        if since < start:
            factor = self._factor[since:start, start:stop]
            self._error[self._here(start, stop)].addmm_(factor.t(), self._change[since:start])

    def _make_up(self, start: int, stop: int) -> None:
        here = self._here(start, stop)
        if stop - start == 1:
            torch.addcdiv(self._old[here], self._error[here], self.scale[start:stop], out=self.values[start:stop])
            return
        lower = self._factor[start:stop, start:stop].t()
        made = torch.linalg.solve_triangular(lower, self._error[here], upper=False)
        torch.add(self._old[here], made, out=self.values[start:stop])


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
