# SPDX-License-Identifier: Apache-2.0
"""Searches an order of input channels in which the n highest of every m neighbours are as high as can be.

Channels are exchanged between blocks of m, best exchanges first, until none gains or the work is spent. What all
exchanges gain is one matrix: if t is the n-th highest of a block without channel i, channel j in its place adds
max(0, x_j - t) to what is kept, and the sums of those over rows are distances, |x - t| + x - t, halved.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Channels whose exchanges are looked at together; more are shuffled into such parts, again in each round.
_PART = 64
_ROUNDS = 30
# Products of channels and rows that one search may look at, and that all ways to share out two blocks may take.
_WORK = 4e9
_PAIR_WORK = 2e7
# Rounds that gain less than this share of what is kept are the last.
_LEAST_GAIN = 2e-4
_DOUBLE_BELOW = 1 << 20


def best_order(readers: Sequence[tuple[Tensor, int]], m: int) -> Tensor:
    """Which channel to put in each place, for ``readers`` of (rows, channels) and the n that each keeps of m.

    >>> best_order([(torch.tensor([[9.0, 8.0, 1.0, 2.0]]), 1)], 2).tolist()
    [0, 2, 1, 3]
    """
    search = _Search(readers, m)
    start = torch.arange(search.size)
    dealt = search.dealt()
    order = search.exchanged(max(start, dealt, key=search.kept))
    return order if search.kept(order) > search.kept(start) else start


class _Search:
    """Columns of all readers, one below the other."""

    def __init__(self, readers: Sequence[tuple[Tensor, int]], m: int) -> None:
        columns = torch.cat([rows.t() for rows, _ in readers], 1).contiguous()
        self.columns = columns.double() if columns.numel() < _DOUBLE_BELOW else columns.float()
        self.n = torch.cat([torch.full((len(rows),), n) for rows, n in readers])
        self.size, self.m = len(columns), m
        self.tolerance = 1e-12 if self.columns.dtype == torch.float64 else 1e-5

    def kept(self, order: Tensor) -> float:
        """The sum over all rows and blocks of their n highest."""
        return float(self._ranked(self.columns[order].unflatten(0, (-1, self.m)))[2].sum(dtype=torch.float64))

    def dealt(self) -> Tensor:
        """Channels by size, dealt to the blocks like cards, forth and back."""
        ranked = self.columns.sum(1, dtype=torch.float64).argsort(descending=True, stable=True).view(self.m, -1)
        return torch.stack([row.flip(0) if i % 2 else row for i, row in enumerate(ranked)], 1).flatten()

    def exchanged(self, order: Tensor) -> Tensor:
        """The order after all exchanges that gain."""
        random = torch.Generator().manual_seed(0)
        part = min(self.size, max(2, _PART // self.m) * self.m)
        before, work = self.kept(order), 0.0
        for _ in range(_ROUNDS):
            order = self._round(order, part, random)
            after, work = self.kept(order), work + self.size * part * self.columns.shape[1]
            if part == self.size and after <= before * (1 + self.tolerance):
                order = self._shared_out(order)
                after = self.kept(order)
            if after <= before * (1 + (self.tolerance if self.columns.numel() < _PAIR_WORK / 64 else _LEAST_GAIN)):
                break
            before = after
            if work > _WORK:
                break
        return order

    def _ranked(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For (blocks, m, rows): the n-th and the next highest of each block, and the sum of the n highest."""
        ranked = blocks.sort(-2, descending=True).values
        last = (self.n - 1).expand(*blocks.shape[:-2], 1, -1)
        following = (self.n % self.m).expand(*blocks.shape[:-2], 1, -1)
        total = ranked.cumsum(-2).gather(-2, last)
        return ranked.gather(-2, last), ranked.gather(-2, following), total

    def _round(self, order: Tensor, part: int, random: torch.Generator) -> Tensor:
        """Exchanges between pairs of blocks, each the best for both of its blocks."""
        blocks = order.view(-1, self.m)
        if part < self.size:
            blocks = blocks[torch.randperm(len(blocks), generator=random)]
        parts = [self._exchange(some) for some in blocks.split(part // self.m)]
        return torch.cat(parts).flatten()

    def _exchange(self, blocks: Tensor) -> Tensor:
        """Blocks of channels (some, m) after exchanges of one channel each."""
        some, m = blocks.shape
        gain = self._gains(blocks).view(some, m, some, m).transpose(1, 2).flatten(2)
        best, which = gain.max(-1)
        best.fill_diagonal_(0)
        most, partner = best.max(-1)
        mine = torch.arange(some)
        chosen = (partner[partner] == mine) & (mine < partner) & (most > 0)
        new = blocks.clone()
        for a in chosen.nonzero().flatten().tolist():
            b = int(partner[a])
            i, j = divmod(int(which[a, b]), m)
            new[a, i], new[b, j] = blocks[b, j], blocks[a, i]
        return new

    def _gains(self, blocks: Tensor) -> Tensor:
        """What is kept more after exchanging the channels of any two places; 0 where that is nothing."""
        x = self.columns[blocks]
        last, following, total = self._ranked(x)
        inside = x >= last
        threshold = torch.where(inside, following, last).flatten(0, 1)
        without = (total - torch.where(inside, x - following, 0)).sum(-1, dtype=torch.float64).flatten()
        x, now = x.flatten(0, 1), total.sum(-1, dtype=torch.float64).expand(-1, self.m).flatten()
        sums, others = x.sum(1, dtype=torch.float64), threshold.sum(1, dtype=torch.float64)
        # At (i, j): channel j in the place of i.
        replaced = (torch.cdist(threshold, x, p=1) - others[:, None] + sums) / 2 + without[:, None]
        gain = replaced + replaced.t() - now[:, None] - now
        return torch.where(gain > self.tolerance * (now[:, None] + now), gain, 0)

    def _shared_out(self, order: Tensor) -> Tensor:
        """Each two blocks share out their channels in the best of all ways, where there are few."""
        blocks, m = order.view(-1, self.m).clone(), self.m
        ways = math.comb(2 * m - 1, m - 1)
        pairs = list(itertools.combinations(range(len(blocks)), 2))
        if len(pairs) * ways * 2 * m * self.columns.shape[1] > _PAIR_WORK:
            return order
        first = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
        splits = torch.tensor([[*own, *(i for i in range(2 * m) if i not in own)] for own in first])
        for a, b in pairs:
            channels = torch.cat([blocks[a], blocks[b]])
            kept = self._ranked(self.columns[channels[splits]].unflatten(1, (2, m)))[2].sum((1, 2, 3))
            best = int(kept.argmax())
            if kept[best] > kept[0] * (1 + self.tolerance):
                blocks[a], blocks[b] = channels[splits[best]].view(2, m)
        return blocks.flatten()
