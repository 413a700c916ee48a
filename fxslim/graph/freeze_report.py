# SPDX-License-Identifier: Apache-2.0
"""What keeps channels from going, what it costs, and what would lift it."""

from collections.abc import Mapping

# A part of a reason, and what its owner can do.
HINTS = {
    "has fixed sizes": "read the size from the tensor (x.flatten(1), x.shape[1]) or from an attribute of the module",
    "does not follow": "compute the size from the tensor whose channels it counts, with + - * // only",
    "can't have two values": "give each of the two sizes an attribute of its own",
    "number of heads that is written down": "pass the number of heads from an attribute of the module",
    "picks channels by number": "slice by a size that is computed, such as x.shape[1] // 2, or by an attribute",
    "a slice up to": "slice by a size that is computed, such as x.shape[1] // 2, or by an attribute",
    "has no rule": "tell us of the operator; until then its inputs stay whole",
    "activations along different channels": "each entry belongs to two channels; heads='whole' may remove whole heads",
    "shared by all queries": "heads='dim' makes each head narrower instead of removing whole ones",
    "computed from a width": "keep the number as a float attribute of the module (self.scale = width ** -0.5)",
    "not reached": "give example inputs that take this path: inputs=[first, second]",
    "first state of a recurrent layer": "let the layer make its first state itself",
}


def tell_freezes(frozen: Mapping[str, str], macs: Mapping[str, int]) -> list[str]:
    """Reasons by the macs of the layers that they keep whole, the costliest first, with what would lift them."""
    layers: dict[str, list[str]] = {}
    for layer, why in frozen.items():
        layers.setdefault(why, []).append(layer)
    total = max(sum(macs.values()), 1)
    cost = {why: sum(macs.get(layer, 0) for layer in mine) / total for why, mine in layers.items()}
    lines = []
    for why in sorted(layers, key=lambda why: -cost[why]):
        mine = layers[why]
        more = f" and {len(mine) - 4} more" if len(mine) > 4 else ""
        lines.append(f"  {cost[why]:6.1%} of macs: {', '.join(mine[:4])}{more}: {why}")
        lines += [f"         -> {hint}" for part, hint in HINTS.items() if part in why]
    return lines
