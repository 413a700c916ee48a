# SPDX-License-Identifier: Apache-2.0
"""Hears what the layers of a fit read while a user's batches run, at the same places in any model of that shape."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError
from fxslim.pruning.repair.fitted_layers import LayerFit
from fxslim.pruning.repair.sampled_rows import Fitted, draw_places, output_shape, outputs_at, rows_read
from fxslim.pruning.repair.settings import Repair

# Outputs that are compared with weight times input, and how far they may be off: bfloat16 has 8 bits.
_CHECKED, _OFF = 32, 2.0**-5


class Listener:
    """Calls ``hear(fit, call, rows)`` for each call of a layer, with what it read as groups x rows x columns."""

    def __init__(self, fits: Iterable[LayerFit], repair: Repair, hear: Callable[[LayerFit, int, Tensor], None]) -> None:
        self.fits, self.repair, self.hear = list(fits), repair, hear
        self.batch = 0
        self.calls: Counter[str] = Counter()
        # Why a layer is heard no more.
        self.refused: dict[str, str] = {}

    def start_batch(self, number: int) -> None:
        """Calls are counted anew in each batch, so that two models draw the same places."""
        self.batch = number
        self.calls.clear()

    @contextlib.contextmanager
    def at(self, model: nn.Module, *, check: bool = False) -> Iterator[None]:
        """Listen to the layers of this model; ``check`` that each does what a layer of its type does."""
        handles = []
        for fit in self.fits:

            def collect(layer: Any, args: Any, kwargs: Any, result: Any, fit: LayerFit = fit) -> None:
                if fit.name not in self.refused:
                    self._collect(fit, layer, args[0] if args else kwargs["input"], result, check)

            handles.append(model.get_submodule(fit.name).register_forward_hook(collect, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, fit: LayerFit, layer: Fitted, x: Tensor, result: Tensor, check: bool) -> None:
        self.calls[fit.name] += 1
        call, shape = self.calls[fit.name], output_shape(layer, result)
        total = torch.Size(shape).numel()
        places = draw_places(total, self.repair.num_positions, (self.repair.seed, self.batch, call))
        if not len(places):
            return
        if check and not _is_product(layer, x, result, shape, places[:_CHECKED]):
            self.refused[fit.name] = (
                "what it returns is not its weight times its input: a hook or a subclass changes it"
            )
            return
        rows = rows_read(layer, x, shape, places, fit.taps)
        if not rows.isfinite().all():
            raise CalibrationError(
                f"repair: {fit.name} reads NaN or infinity in batch {self.batch} of data "
                f"({int((~rows.isfinite()).sum())} of {rows.numel()} sampled values): mend the data or the weights"
            )
        self.hear(fit, call, rows)


def _is_product(layer: Fitted, x: Tensor, result: Tensor, shape: tuple[int, ...], places: Tensor) -> bool:
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    rows = rows_read(layer, x, shape, places, 1).double()
    want = torch.bmm(rows, layer.weight.double().reshape(groups, -1, rows.shape[2]).transpose(1, 2))
    want = want.transpose(0, 1).flatten(1)
    if layer.bias is not None:
        want = want + layer.bias.double()
    found = outputs_at(layer, result, places).double()
    largest = want.abs().max().clamp(min=1e-30)
    return want.shape == found.shape and not bool((want - found).abs().max() > _OFF * largest)
