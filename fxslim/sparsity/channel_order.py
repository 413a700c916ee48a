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
_PART = 32
_ROUNDS = 30
# Entries compared by all rounds of a search, and by one look at all ways to share out two blocks.
_WORK = 5e8
_PAIR_WORK = 2e7
# Of what is kept: rounds of parts that gain less are the last.
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
        work = self.size * part * self.columns.shape[1]
        least = (self.tolerance if part == self.size else _LEAST_GAIN) * self.kept(order)
        for _ in range(max(1, min(_ROUNDS, int(_WORK / work)))):
            order, gain = self._round(order, part, random)
            if gain <= least and part == self.size:
                order, gain = self._shared_out(order)
            if gain <= least:
                break
        return order

    def _ranked(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For (blocks, m, rows): the n-th and the next highest of each block, and the sum of the n highest."""
        ranked = _descending(blocks)
        n = self.n.unique().tolist()
        if len(n) == 1:
            last, following, total = ranked[n[0] - 1], ranked[n[0] % self.m], torch.stack(ranked[: n[0]]).sum(0)
        else:
            stacked = torch.stack(ranked)
            last = self._chosen(stacked, self.n - 1)
            following = self._chosen(stacked, self.n % self.m)
            total = self._chosen(stacked.cumsum(0), self.n - 1)
        return last.unsqueeze(-2), following.unsqueeze(-2), total.unsqueeze(-2)

    def _chosen(self, ranked: Tensor, which: Tensor) -> Tensor:
        """Of (m, ..., rows) the one of ``which`` of each row."""
        return ranked.gather(0, which.expand(1, *ranked.shape[1:])).squeeze(0)

    def _round(self, order: Tensor, part: int, random: torch.Generator) -> tuple[Tensor, float]:
        """Exchanges between pairs of blocks, each the best for both of its blocks; and what they gain."""
        blocks = order.view(-1, self.m)
        if part < self.size:
            blocks = blocks[torch.randperm(len(blocks), generator=random)]
        parts = [self._exchange(some) for some in blocks.split(part // self.m)]
        return torch.cat([new for new, _ in parts]).flatten(), sum(gain for _, gain in parts)

    def _exchange(self, blocks: Tensor) -> tuple[Tensor, float]:
        """Blocks of channels (some, m) after exchanges of one channel each, and what those gain."""
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
        return new, float(most[chosen].sum())

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

    def _shared_out(self, order: Tensor) -> tuple[Tensor, float]:
        """Each two blocks share out their channels in the best of all ways, where there are few; and the gain."""
        blocks, m, gain = order.view(-1, self.m).clone(), self.m, 0.0
        ways = math.comb(2 * m - 1, m - 1)
        pairs = list(itertools.combinations(range(len(blocks)), 2))
        if len(pairs) * ways * 2 * m * self.columns.shape[1] > _PAIR_WORK:
            return order, 0.0
        first = [(0, *rest) for rest in itertools.combinations(range(1, 2 * m), m - 1)]
        splits = torch.tensor([[*own, *(i for i in range(2 * m) if i not in own)] for own in first])
        for a, b in pairs:
            channels = torch.cat([blocks[a], blocks[b]])
            kept = self._ranked(self.columns[channels[splits]].unflatten(1, (2, m)))[2].sum((1, 2, 3))
            best = int(kept.argmax())
            if kept[best] > kept[0] * (1 + self.tolerance):
                blocks[a], blocks[b] = channels[splits[best]].view(2, m)
                gain += float(kept[best] - kept[0])
        return blocks.flatten(), gain


def _descending(blocks: Tensor) -> list[Tensor]:
    """The m entries of (..., m, rows) from the highest: neighbours change places, faster than sorting so few."""
    ranked = list(blocks.unbind(-2))
    for turn in range(len(ranked)):
        for i in range(turn % 2, len(ranked) - 1, 2):
            ranked[i], ranked[i + 1] = ranked[i].maximum(ranked[i + 1]), ranked[i].minimum(ranked[i + 1])
    return ranked
