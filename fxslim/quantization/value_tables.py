# SPDX-License-Identifier: Apache-2.0
"""All values that a tensor can have which is computed, one by one, from one or two tensors on grids."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from fxslim.quantization.dataflow import Dataflow, operator_of

# What these give at one place depends on nothing but what they read there.
_ONE_BY_ONE = frozenset(
    """
    add sub mul div neg relu relu6 hardtanh clamp clamp_min clamp_max leaky_relu elu sigmoid hardsigmoid silu hardswish
    mish gelu tanh softplus
    """.split()
)
_POOLS = frozenset(("avg_pool1d", "avg_pool2d", "avg_pool3d"))
_AVERAGES = _POOLS | frozenset(("mean", "_adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"))
# Longer tables are no longer quickly gone through, and their values lie everywhere.
_LONGEST = 2**17
# As many different results as reach a concatenation, at most.
_MOST_TABLES = 16


class Levels(NamedTuple):
    """The values of a grid: ``scale`` times the integers from ``least`` to ``most``."""

    scale: float
    least: int
    most: int

    def values(self) -> Tensor:
        """All of them."""
        return torch.arange(self.least, self.most + 1, dtype=torch.float64, device="cpu") * self.scale


class _Table(NamedTuple):
    """Values by what they depend on: one dim for each of the tensors in ``given``."""

    given: tuple[Any, ...]
    values: Tensor

    def over(self, given: tuple[Any, ...]) -> Tensor:
        """The values with a dim for each of these, in their order."""
        own = [one for one in given if one in self.given]
        values = self.values.permute([self.given.index(one) for one in own])
        return values.reshape([values.shape[own.index(one)] if one in own else 1 for one in given])


class ValueTables:
    """Tables for tensors of one recording. ``levels``: {a tensor on a grid: its values}."""

    def __init__(self, flow: Dataflow, levels: Mapping[fx.Node, Levels]) -> None:
        self._flow, self._levels = flow, levels
        self._known: dict[fx.Node, list[_Table]] = {}
        self._written = {flow.source(node) for node in _written_elsewhere(flow)}

    def of(self, node: fx.Node) -> list[Tensor]:
        """The values of each tensor that ends up in this one, as far as they can be told."""
        found = [table.values.reshape(-1) for table in self._tables(node)]
        # Long ones are soon too many to keep.
        self._known.clear()
        return found

    def _tables(self, node: fx.Node) -> list[_Table]:
        waiting = [node]
        while waiting:
            one = waiting[-1]
            if one in self._known:
                waiting.pop()
                continue
            missing = [] if one in self._levels else [given for given in self._reads(one) if given not in self._known]
            if missing:
                waiting += missing
                continue
            self._known[waiting.pop()] = self._made(one)
        return self._known[node]

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that its values come from; none of what no table can be made of."""
        name = operator_of(node)
        if getattr(node.target, "namespace", "aten") != "aten" or node.kwargs.get("rounding_mode"):
            return []
        if name == "cat":
            return list(node.all_input_nodes)
        if name in _ONE_BY_ONE or name in _AVERAGES or self._flow.is_move(node):
            given = [arg for arg in node.args if isinstance(arg, fx.Node)]
            return given if set(given) == set(node.all_input_nodes) else []
        return []

    def _made(self, node: fx.Node) -> list[_Table]:
        if self._flow.source(node) in self._written:
            return []
        if node in self._levels:
            return [_Table((node,), self._levels[node].values())]
        reads = self._reads(node)
        if not reads:
            return []
        if operator_of(node) == "cat":
            tables = [table for one in reads for table in self._known[one]]
            return tables if len(tables) <= _MOST_TABLES else []
        if self._flow.is_move(node):
            # At another place: no longer the same as what was moved.
            return [_Table(tuple((node, one) for one in given), values) for given, values in self._known[reads[0]]]
        if operator_of(node) in _AVERAGES:
            return self._averages(node, reads[0])
        return self._one_by_one(node, [self._known[one] for one in reads], reads)

    def _one_by_one(self, node: fx.Node, tables: list[list[_Table]], reads: list[fx.Node]) -> list[_Table]:
        if any(len(one) != 1 for one in tables):
            # Of what was joined, an operator on one tensor can still be told.
            return [t for one in tables[0] for t in self._computed(node, {reads[0]: one})] if len(tables) == 1 else []
        return self._computed(node, {read: one[0] for read, one in zip(reads, tables, strict=True)})

    def _computed(self, node: fx.Node, tables: Mapping[fx.Node, _Table]) -> list[_Table]:
        sizes = {
            one: size for table in tables.values() for one, size in zip(table.given, table.values.shape, strict=True)
        }
        if len(sizes) > 2 or math.prod(sizes.values()) > _LONGEST:
            return []
        given, target = tuple(sizes), cast(Any, node.target)
        # Operators in place write into their first argument.
        values = {read: table.over(given).expand(*sizes.values()).clone() for read, table in tables.items()}
        args = [values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        try:
            return [_Table(given, target(*args, **node.kwargs))]
        except (TypeError, RuntimeError):
            # Arguments of which a recording only tells the names.
            return []

    def _averages(self, node: fx.Node, read: fx.Node) -> list[_Table]:
        """Of a number of values of one grid: its values, and what is between them."""
        source = read
        while source not in self._levels and self._flow.is_move(source) and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        number = _number_averaged(node, read)
        if source not in self._levels or number is None:
            return []
        scale, least, most = self._levels[source]
        if number * (most - least) > _LONGEST:
            return []
        return [_Table((node,), Levels(scale / number, least * number, most * number).values())]


def _written_elsewhere(flow: Dataflow) -> Iterator[fx.Node]:
    """Tensors that operators write into under another name, that of a view: what is read of them later has changed."""
    for node in flow.recording.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        others = [user for user in node.args[0].users if user is not node]
        if node.meta.get("mutates_view") or any(flow.is_move(user) for user in others):
            yield node.args[0]


def _number_averaged(node: fx.Node, read: fx.Node) -> int | None:
    """How many values each result is the average of; None where not all are of as many."""
    before, after = read.meta["shape"], node.meta["shape"]
    if operator_of(node) not in _POOLS:
        even = operator_of(node) == "mean" or all(
            one and not all_ % one for all_, one in zip(before, after, strict=True)
        )
        return math.prod(before) // math.prod(after) if even and math.prod(after) else None
    named = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given: dict[str, Any] = dict(zip(named, node.args[1:], strict=False)) | node.kwargs
    padded = any(given.get("padding") or [0])
    if given.get("ceil_mode") or given.get("divisor_override") or (padded and not given.get("count_include_pad", True)):
        return None
    kernel = given["kernel_size"]
    dims = int(operator_of(node)[-2])
    return math.prod(kernel) if len(kernel) == dims else kernel[0] ** dims
