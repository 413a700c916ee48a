# SPDX-License-Identifier: Apache-2.0
"""Sizes that the forward reads: they follow by themselves when channels go, or an attribute must change, or can't."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxslim.graph.computed_layers import find_fixed_layers
from fxslim.graph.labels import Ids, Labels, LabelSpace
from fxslim.graph.surgery.attributes import new_attributes
from fxslim.graph.tagged_attributes import held_value
from fxslim.graph.tagged_sizes import Attribute, Expression, Extent, evaluate, leaves, solve
from fxslim.graph.weight_norms import layer_states


@dataclass(frozen=True, kw_only=True)
class SizeCheck:
    """An expression in the user's code that must equal the number of kept entries of ``ids`` divided by ``parts``.

    ``static``: entries besides ids' that always stay (a size without channels has no ids at all).
    """

    node: fx.Node
    expression: Expression
    ids: Ids
    parts: int = 1
    static: int = 0


@dataclass(frozen=True, kw_only=True)
class NewAttribute:
    """An int that the user's module keeps (or one item of a tuple) and that follows the channels."""

    attribute: Attribute
    before: int
    after: int


def as_size(value: object) -> int:
    """An attribute that is known to be an int."""
    assert isinstance(value, int), value
    return int(value)


@dataclass(kw_only=True)
class NewSizes:
    """Values of all sizes and attributes when only the kept entries are left."""

    keep: np.ndarray
    classes: Ids
    modules: dict[str, nn.Module]
    states: dict[str, Tensor]
    slot_ids: dict[tuple[str, int], tuple[Ids, int]]
    values: dict[fx.Node, Labels | list[Labels]]
    space: LabelSpace
    assigned: dict[Attribute, int] = field(default_factory=dict)
    _families: dict[str, dict[str, object]] = field(default_factory=dict)

    def kept_count(self, ids: Ids) -> int:
        return int(self.keep[self.classes[ids]].sum())

    def lookup(self, leaf: Attribute | Extent) -> int:
        """The new value of a size or an attribute."""
        if isinstance(leaf, Extent):
            return self._extent(leaf)
        if leaf in self.assigned:
            return self.assigned[leaf]
        found = self._family(leaf.module).get(leaf.name)
        if found is None:
            found = held_value(self.modules[leaf.module], leaf.name)
        return as_size(found if leaf.item is None else found[leaf.item])  # type: ignore[index]

    def is_derived(self, attribute: Attribute) -> bool:
        """Whether surgery sets it from the layer's new parameters."""
        return attribute.name in self._family(attribute.module)

    def _extent(self, leaf: Extent) -> int:
        if leaf.node.op == "get_attr":
            return self._state_shape(str(leaf.node.target))[leaf.dim]
        labels = self.values.get(leaf.node)
        size = int(leaf.node.meta["shape"][leaf.dim])
        if not isinstance(labels, Labels) or labels.ids.shape[leaf.dim] == 1:
            return size
        if self.space.keeps_rows(labels, leaf.dim):
            return size
        return self.kept_count(labels.line(leaf.dim))

    def _state_shape(self, name: str) -> list[int]:
        shape = list(self.states[name].shape)
        for dim in range(len(shape)):
            if (name, dim) in self.slot_ids:
                ids, blocks = self.slot_ids[name, dim]
                shape[dim] = self.kept_count(ids) // blocks
        return shape

    def _family(self, name: str) -> dict[str, object]:
        if name not in self._families:
            module = self.modules[name]
            local, prefix = layer_states(module), name + "." if name else ""
            new = {
                n: torch.empty(self._state_shape(prefix + own), device="meta")
                for n, (own, _) in local.items()
                if prefix + own in self.states
            }
            whole = len(new) == len(local) and bool(local)
            computed = "" in find_fixed_layers(module)
            self._families[name] = new_attributes(module, new) if whole and not computed else {}
        return self._families[name]

    def failed(self, checks: list[SizeCheck]) -> tuple[SizeCheck, str] | None:
        """Find attribute values that satisfy all checks; the first check for which there are none, and why."""
        # Sizes of one attribute first: they leave no choice, where a product of two does.
        checks = sorted(checks, key=lambda check: sum(isinstance(leaf, Attribute) for leaf in leaves(check.expression)))
        for final in (False, True):
            for check in checks:
                wanted, rest = divmod(self.kept_count(check.ids), check.parts)
                wanted += check.static
                got = evaluate(check.expression, self.lookup)
                if rest == 0 and got == wanted:
                    continue
                answer = solve(check.expression, wanted, self.lookup) if rest == 0 and not final else None
                where = check.node.meta["call"].where
                if answer is None:
                    return check, f"a size at {where} does not follow"
                attribute, value = answer
                if self.is_derived(attribute) or self.assigned.get(attribute, value) != value:
                    return check, f"{attribute} is read at {where} and can't have two values"
                self.assigned[attribute] = value
        return None

    def new_attributes(self) -> tuple[NewAttribute, ...]:
        """The attributes of the user's modules that must change."""
        found = []
        for attribute, after in self.assigned.items():
            value = held_value(self.modules[attribute.module], attribute.name)
            before = int(value if attribute.item is None else value[attribute.item])
            if before != after:
                found.append(NewAttribute(attribute=attribute, before=before, after=after))
        return tuple(found)
