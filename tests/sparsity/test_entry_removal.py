# SPDX-License-Identifier: Apache-2.0
"""Counting and keeping by scores: as Unstructured's masks say, ties included."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim.patterns import Unstructured
from fxslim.sparsity.entry_removal import count_lowest, keep_highest

SCORES = st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5)).map(
    lambda sizes: torch.randint(0, sizes[2], sizes[:2]).float()
)


@given(SCORES, st.integers(1, 40), st.floats(0, 0.99))
def test_runs_lose_what_the_pattern_takes_from_them(scores: torch.Tensor, length: int, ratio: float) -> None:
    num_removed = round(ratio * len(scores))
    if not num_removed:
        return
    mask = Unstructured(ratio, per_output=True).mask(scores.t()).t()
    wanted = torch.stack([(~run).sum(0) for run in mask.split(length)])
    assert torch.equal(count_lowest(scores, num_removed, length), wanted)


@given(SCORES, st.data())
def test_the_lowest_of_each_column_go_and_of_equal_ones_the_later(scores: torch.Tensor, data: st.DataObject) -> None:
    size = len(scores)
    counts = torch.tensor([data.draw(st.integers(0, size)) for _ in range(scores.shape[1])])
    mask = keep_highest(scores, counts)
    for column, count, kept in zip(scores.t(), counts.tolist(), mask.t(), strict=True):
        order = sorted(range(size), key=lambda place, column=column: (float(column[place]), -place))
        assert sorted(order[count:]) == kept.nonzero().flatten().tolist()
