# SPDX-License-Identifier: Apache-2.0
"""Tries a removal on labels alone, and gives up exactly what does not work out.

Sizes that the forward computes and the order of channels behind split views can only be judged for a
concrete choice. A random choice shows structural conflicts: the views involved are tied, or their
channels stay, and the labels are run again until nothing conflicts.
"""

import operator
from dataclasses import dataclass

import numpy as np
from torch import nn

from fxslim.graph.conflicts import Conflict, Decisions
from fxslim.graph.groups import ResolvedLabels, free_channels
from fxslim.graph.kept_order import PARTING, KeptOrder, Misorder
from fxslim.graph.propagation import Propagation, as_node, operator_name
from fxslim.graph.recording import Recording
from fxslim.graph.size_checks import NewAttribute, NewSizes, SizeCheck
from fxslim.graph.slots import LayerCall, SlotKey
from fxslim.graph.steps import affordable, removal_steps
from fxslim.graph.tagged_sizes import Attribute, Extent, leaves
from fxslim.graph.width_scales import Scaling, Unkept, WidthScales


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What a choice of channels means beyond sets of indices: orders of parameter dims, values of attributes."""

    orders: dict[SlotKey, tuple[int, ...]]
    attributes: tuple[NewAttribute, ...]
    scalings: tuple[Scaling, ...] = ()


class Arranger:
    """Works out arrangements for one propagation."""

    def __init__(
        self,
        propagation: Propagation,
        resolved: ResolvedLabels,
        recordings: list[Recording],
        calls: tuple[LayerCall, ...],
    ) -> None:
        self.propagation = propagation
        # The cost of one forward on the first example.
        self.calls = calls
        self.resolved = resolved
        self.recordings = recordings

    def arrange(self, keep: np.ndarray) -> Arrangement | Conflict:
        """The arrangement for the classes that stay."""
        propagation = self.propagation
        sizes = NewSizes(
            keep=keep,
            classes=self.resolved.classes,
            modules=propagation.modules,
            states=propagation.states,
            slot_ids={slot.key: (slot.ids, slot.blocks) for slot in self.resolved.slots},
            values=propagation.values,
            space=propagation.space,
        )
        failure = sizes.failed(propagation.checks)
        if failure is not None:
            return self._give_up(*failure)
        order = KeptOrder(propagation, self.resolved.classes, keep)
        misorder = order.run(self.recordings) if propagation.splits else None
        if misorder is not None:
            return self._way_out(misorder)
        scales = WidthScales(propagation, self.recordings, sizes)
        unkept = scales.find()
        if unkept:
            return self._keep_widths(unkept)
        return Arrangement(orders=order.slots, attributes=sizes.new_attributes(), scalings=tuple(scales.scalings))

    def _keep_widths(self, unkept: list[Unkept]) -> Conflict:
        """Sizes that are used as numbers stay what they are where no layer can make up for them."""
        nothing = np.zeros(0, dtype=np.int64)
        conflicts = []
        for one in unkept:
            for size in one.sizes:
                reason = f"a number is computed from a width at {size.where}"
                read = tuple(leaf.node for leaf in leaves(size.expression) if isinstance(leaf, Extent))
                if any(node not in self.propagation.decisions.whole for node in read):
                    conflicts.append(Conflict(reason=reason, whole=read))
                    continue
                check = SizeCheck(node=one.node, expression=size.expression, ids=nothing, static=int(size))
                conflicts.append(self._give_up(check, reason))
        return Conflict(reason=conflicts[0].reason, whole=tuple(node for c in conflicts for node in c.whole))

    def _give_up(self, failed: SizeCheck, reason: str) -> Conflict:
        """A size that does not follow keeps what it reads whole; so do all readers of an attribute in it."""
        attributes = {leaf for leaf in leaves(failed.expression) if isinstance(leaf, Attribute)}
        related = [c for c in self.propagation.checks if c is failed or not attributes.isdisjoint(leaves(c.expression))]
        whole = self.propagation.decisions.whole
        for checks in ([failed], related):
            read = [leaf.node for c in checks for leaf in leaves(c.expression) if isinstance(leaf, Extent)]
            nodes = [*(node for c in checks for node in (*c.node.all_input_nodes, c.node)), *read]
            if any(node not in whole for node in nodes):
                return Conflict(reason=reason, whole=tuple(nodes))
        return Conflict(reason=reason)

    def _way_out(self, misorder: Misorder) -> Conflict:
        """Even counts where channels are parted after a shuffle; else the shuffled rows are tied; else they stay."""
        node, decisions = misorder.node, self.propagation.decisions
        reason = f"channels in two orders meet in {node.meta.get('module') or 'the forward'}"
        owner = as_node(node.args[0]) if node.target is operator.getitem else node
        uneven = [(owner, view) for view in misorder.splits if (owner, view) not in decisions.even]
        if operator_name(owner) in PARTING and uneven:
            return Conflict(reason=reason, even=tuple(uneven))
        free = misorder.splits - decisions.tied
        return Conflict(reason=reason, tied=free, whole=() if free else tuple(node.all_input_nodes))

    def trial(self) -> Conflict | None:
        """A random half of what each group can lose."""
        resolved, groups = self.resolved, self.resolved.groups()
        random = np.random.default_rng(0)
        steps = removal_steps(random.permutation(free_channels(groups)), resolved.frozen, resolved.balances)
        keep = np.ones(len(resolved.classes), dtype=bool)
        keep[affordable(steps, groups, [len(group) // 2 for group in groups]).channels] = False
        outcome = self.arrange(keep)
        return outcome if isinstance(outcome, Conflict) else None


def settle(model: nn.Module, recordings: list[Recording], decisions: Decisions | None = None) -> Arranger:
    """Run the labels until a trial removal works out."""
    decisions = decisions or Decisions()
    while True:
        propagation = Propagation(model, decisions)
        propagation.run(recordings[0])
        calls = tuple(propagation.calls)
        for recording in recordings[1:]:
            propagation.run(recording)
        if propagation.wishes:
            decisions = decisions.after(*propagation.wishes)
            continue
        arranger = Arranger(propagation, ResolvedLabels(propagation), recordings, calls)
        if not (propagation.splits or propagation.checks or any(recording.numbers for recording in recordings)):
            return arranger
        conflict = arranger.trial()
        if conflict is None:
            return arranger
        decisions = decisions.after(conflict)
