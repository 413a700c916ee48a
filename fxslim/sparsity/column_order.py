# SPDX-License-Identifier: Apache-2.0
"""In which order the columns of a weight are looked at, and which of them together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fxslim.patterns import NM, Unstructured

Run = tuple[int, int]
# Fewer together see more of what went before; but each output needs some to choose from.
_TOGETHER, _TOGETHER_PER_OUTPUT = 8, 32


def order_columns(energy: Tensor, channels: int, pattern: NM | Unstructured) -> tuple[Tensor, list[Run]]:
    """Columns of ``weight.flatten(1)`` in order, and the runs of them, (start, stop), that are chosen together.

    ``energy`` is the sum of squares of what each column reads. Where counts are fixed, the strongest inputs come
    first: most others can still make up for their weights. Where they are free, the weakest do: most of their weights
    go, and the strong ones make up for them.

    >>> order_columns(torch.tensor([1.0, 2.0, 2.0, 3.0, 1.0]), 5, NM(1, 2))
    (tensor([2, 3, 0, 1, 4]), [(0, 2), (2, 4), (4, 5)])
    """
    if isinstance(pattern, Unstructured):
        size = _TOGETHER_PER_OUTPUT if pattern.per_output else _TOGETHER
        return energy.argsort(stable=True), _runs(len(part) for part in energy.split(size))
    if pattern.axis == 0:
        return energy.argsort(stable=True, descending=True), _runs([1] * len(energy))
    by_position = torch.arange(len(energy), device=energy.device).view(channels, -1).t()
    groups = [group for position in by_position for group in position.split(pattern.m)]
    sums = torch.stack([energy[group].sum() for group in groups])
    sorted_groups = [groups[index] for index in sums.argsort(stable=True, descending=True).tolist()]
    return torch.cat(sorted_groups), _runs(len(group) for group in sorted_groups)


def _runs(sizes: Iterable[int]) -> list[Run]:
    runs: list[Run] = []
    for size in sizes:
        start = runs[-1][1] if runs else 0
        runs.append((start, start + size))
    return runs
