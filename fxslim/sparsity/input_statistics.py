# SPDX-License-Identifier: Apache-2.0
"""What layers read on a user's data: sums of products of their inputs, or of squares only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import CalibrationError
from fxslim.graph.watched_runs import run_all
from fxslim.graph.weight_uses import WeightUse, WeightUses, read_rows
from fxslim.patterns.weight_layout import layout_of

# Entries of what is read that are laid out at a time.
_PIECE = 1 << 24


@dataclass(eq=False)
class Part:
    """Rows of a weight that read the same: ``gram`` (or with squares only its diagonal), summed over ``num`` places."""

    first: int
    last: int
    gram: Tensor
    num: int = 0


Statistics = dict[str, list[Part]]


class _Sums:
    """Adds up what is heard of each weight, part by part."""

    def __init__(self, weights: Mapping[str, tuple[nn.Module, Tensor]], squares_only: bool) -> None:
        self.weights, self.squares_only = weights, squares_only
        self.parts: dict[str, dict[tuple[int, int], Part]] = {name: {} for name in weights}
        self.batch = 0

    def hear(self, use: WeightUse) -> None:
        layer, weight = self.weights[use.name]
        layout = layout_of(layer)
        each = max(1, (use.last - use.first) // layout.groups)
        for x in _pieces(use, weight):
            rows = read_rows(x, weight)
            rows = rows.double() if weight.dtype == torch.float64 else rows.float()
            # A user's autocast is for the model, and would round the sums.
            with torch.autocast(rows.device.type, enabled=False):
                added = rows.square().sum(1) if self.squares_only else rows.transpose(1, 2) @ rows
            if not torch.isfinite(added).all():
                raise CalibrationError(
                    f"{use.name} reads NaN, infinity or numbers too large to square in batch {self.batch} of data: "
                    "mend the data or the weights before it"
                )
            for group, sums in enumerate(added):
                first = use.first + group * each
                self._add(use.name, (first, first + each), sums, rows.shape[1])

    def _add(self, name: str, key: tuple[int, int], sums: Tensor, num: int) -> None:
        part = self.parts[name].setdefault(key, Part(*key, torch.zeros_like(sums)))
        part.gram += sums
        part.num += num


def _pieces(use: WeightUse, weight: Tensor) -> Iterable[WeightUse]:
    """The use for some images at a time."""
    copies = weight[0].numel() // max(1, weight.shape[1]) if use.convolution is not None else 1
    if use.convolution is not None and use.x.dim() < weight.dim():
        yield use
        return
    each = max(1, use.x[:1].numel() * copies)
    for x in use.x.split(max(1, _PIECE // each)):
        yield WeightUse(
            name=use.name, x=x, first=use.first, last=use.last, module=use.module, convolution=use.convolution
        )


def gather_statistics(
    model: nn.Module,
    data: Data,
    weights: Mapping[str, tuple[nn.Module, Tensor]],
    *,
    squares_only: bool = False,
) -> Statistics:
    """Run all batches in eval mode; each weight (with its layer) must be reached by them.

    Only what the model really multiplies with a weight counts, also where a function uses it.
    """
    sums = _Sums(weights, squares_only)
    uses = WeightUses(model, {name: weight for name, (_, weight) in weights.items()}, sums.hear)
    run_all(model, data, uses, lambda number: setattr(sums, "batch", number))
    found: Statistics = {}
    for name, parts in sums.parts.items():
        found[name] = sorted(parts.values(), key=lambda part: part.first)
        _check_reached(name, found[name], weights[name])
    return found


def _check_reached(name: str, parts: list[Part], weight: tuple[nn.Module, Tensor]) -> None:
    """Every row was used, none in two ways."""
    rows, at = layout_of(weight[0]).rows(weight[1]).shape[0], 0
    for part in parts:
        if part.first != at:
            break
        at = part.last
    if at == rows and all(part.num for part in parts) and parts:
        return
    if at == rows and parts:
        raise CalibrationError(f"{name} ({rows} outputs) reads batches of data without a sample: give some that have")
    reason = (
        "data never reached it as inputs times its rows"
        if not parts
        else f"data reached rows {[(p.first, p.last) for p in parts]} of it"
    )
    raise CalibrationError(f"{name} ({rows} outputs): {reason}; skip it, or give data that takes this path")
