# SPDX-License-Identifier: Apache-2.0
"""What a model costs: multiply-adds at batch 1, parameters, bytes; per layer, and after removals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxslim.graph.slots import LayerCall, owner

# The share of entries that each cut dim keeps.
Shares = Mapping[tuple[str, int], float]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """macs, params and size_bytes; ``layers`` has the macs of each layer."""

    calls: tuple[LayerCall, ...]
    state_shapes: dict[str, tuple[int, ...]]
    element_sizes: dict[str, int]
    parameter_names: frozenset[str]

    def macs_with(self, shares: Shares) -> float:
        """Multiply-adds when dims keep only these shares."""
        return sum(call.macs * math.prod(shares.get(f, 1.0) for f in call.factors) for call in self.calls)

    def bitops_with(self, shares: Shares) -> float:
        """Multiply-adds, each times the bits of its two operands: those of the layer's weights, for both."""
        bits = {owner(name): 8 * size for name, size in self.element_sizes.items()}
        usual = max(bits.values(), default=32)
        return sum(
            call.macs * bits.get(call.name, usual) ** 2 * math.prod(shares.get(f, 1.0) for f in call.factors)
            for call in self.calls
        )

    def params_with(self, shares: Shares) -> float:
        """Parameters when dims keep only these shares."""
        total = 0.0
        for name in self.parameter_names:
            shape = self.state_shapes[name]
            total += math.prod(shape) * math.prod(shares.get((name, d), 1.0) for d in range(len(shape)))
        return total

    @property
    def macs(self) -> int:
        return round(self.macs_with({}))

    @property
    def bitops(self) -> int:
        return round(self.bitops_with({}))

    @property
    def params(self) -> int:
        return round(self.params_with({}))

    @property
    def size_bytes(self) -> int:
        return sum(math.prod(shape) * self.element_sizes[name] for name, shape in self.state_shapes.items())

    @property
    def layers(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for call in self.calls:
            totals[call.name] = totals.get(call.name, 0) + call.macs
        return totals

    def __str__(self) -> str:
        return f"{self.macs:,} macs, {self.params:,} params, {self.size_bytes:,} bytes"
