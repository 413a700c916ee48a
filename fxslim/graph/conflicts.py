# SPDX-License-Identifier: Apache-2.0
"""What a choice of channels may run into, and what was given up for it so far."""

from dataclasses import dataclass, field

from torch import fx

from fxslim.errors import TraceError


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """Why a choice of channels does not work, and what to give up for it."""

    reason: str
    tied: frozenset[fx.Node] = frozenset()
    whole: tuple[fx.Node, ...] = ()
    single: tuple[fx.Node, ...] = ()
    even: tuple[tuple[fx.Node, fx.Node], ...] = ()
    narrow: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What was given up: pairs of a part and a view that shuffles, where each part of each row keeps as many entries
    as the others; views whose rows lose the very same entries; values that keep all their channels; those that are
    one head for several others; and views that make heads, which stay and get narrower.

    ``heads``: whether attention loses whole heads or entries of each head ("dim").
    """

    heads: str = "whole"
    even: frozenset[tuple[fx.Node, fx.Node]] = frozenset()
    tied: frozenset[fx.Node] = frozenset()
    whole: dict[fx.Node, str] = field(default_factory=dict)
    single: frozenset[fx.Node] = frozenset()
    narrow: frozenset[fx.Node] = frozenset()

    def after(self, *conflicts: Conflict) -> "Decisions":
        """These and what conflicts ask for."""
        more = Decisions(
            heads=self.heads,
            even=self.even.union(*(conflict.even for conflict in conflicts)),
            tied=self.tied.union(*(conflict.tied for conflict in conflicts)),
            single=self.single.union(*(conflict.single for conflict in conflicts)),
            whole={node: conflict.reason for conflict in conflicts for node in conflict.whole} | self.whole,
            narrow=self.narrow.union(*(conflict.narrow for conflict in conflicts)),
        )
        if more == self:
            raise TraceError(f"{conflicts[0].reason}, and keeping the channels there whole does not help")
        return more
