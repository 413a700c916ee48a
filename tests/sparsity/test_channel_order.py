# SPDX-License-Identifier: Apache-2.0
"""The search for an order of channels: against all orders, and never worse than none."""

import itertools

import pytest
import torch
from torch import Tensor

from fxslim.patterns import NM
from fxslim.sparsity.channel_order import best_order


def kept(readers: list[tuple[Tensor, int]], m: int, order: Tensor) -> float:
    """By the patterns' own masks."""
    rows = [(rows[:, order].double(), NM(n, m)) for rows, n in readers]
    return sum(float(x[pattern.mask(x)].sum()) for x, pattern in rows)


def magnitudes(rows: int, channels: int, seed: int, *, uneven: bool = False) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=random).abs()
    return x * torch.rand(channels, generator=random) ** 3 if uneven else x


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_two_blocks_are_shared_out_in_the_best_way(seed: int, n: int) -> None:
    readers = [(magnitudes(5, 8, seed), n)]
    if seed % 2:
        readers.append((magnitudes(3, 8, seed + 100), 1 + seed % 3))
    ways = [
        torch.tensor([0, *own, *(i for i in range(1, 8) if i not in own)])
        for own in itertools.combinations(range(1, 8), 3)
    ]
    best = max(kept(readers, 4, way) for way in ways)
    assert kept(readers, 4, best_order(readers, 4)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 5)])
@pytest.mark.parametrize("uneven", [False, True])
def test_never_worse_and_often_better(n: int, m: int, uneven: bool) -> None:
    for seed, (rows, blocks) in enumerate([(1, 2), (7, 3), (64, 6), (50, 40)]):
        readers = [(magnitudes(rows, m * blocks, seed, uneven=uneven), n)]
        order, start = best_order(readers, m), torch.arange(m * blocks)
        assert sorted(order.tolist()) == start.tolist()
        assert kept(readers, m, order) >= kept(readers, m, start) * (1.01 if uneven and rows > 1 else 1)
        assert torch.equal(order, best_order(readers, m))


def test_an_order_that_can_not_be_better_stays() -> None:
    assert best_order([(torch.ones(3, 16), 2)], 4).tolist() == list(range(16))


def test_many_channels_are_searched_in_parts() -> None:
    readers = [(magnitudes(40, 256, 0), 2), (magnitudes(30, 256, 1), 2)]
    start = torch.arange(256)
    assert kept(readers, 4, best_order(readers, 4)) > 1.02 * kept(readers, 4, start)
