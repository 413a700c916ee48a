# SPDX-License-Identifier: Apache-2.0
"""The values of channels while data runs: what layers read and, where no layer reads a channel, what makes it.

Weights are known by the memory that they lie in, so that those handed to functions are found as those of modules.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.errors import ConfigError
from fxslim.graph.masked_states import masked_state
from fxslim.graph.recording import undisturbed
from fxslim.graph.slots import Slot, entry_sums
from fxslim.pruning.importance.criterion import Context
from fxslim.pruning.importance.gradients import plain_recurrence

# Operators that multiply two matrices: where their factors are among the arguments.
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}

READERS = ("consumer", "depthwise")


class _Watch(TorchDispatchMode):
    """Adds up what ``measure`` makes of the values of each entry of the slots."""

    def __init__(self, context: Context, slots: Iterable[Slot], measure: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.measure, self.states = measure, context.states
        self.slots = list(slots)
        self.sums = {slot.key: np.zeros(len(slot.ids)) for slot in self.slots}
        self.counts = {slot.key: np.zeros(len(slot.ids)) for slot in self.slots}
        self.names = {id(state): name for name, state in context.states.items()}
        # Multiplied with a gain over a norm, where torch does not do it in one.
        self.directions = context.gains.keys()
        self.alive: list[Tensor] = []
        self.by_memory: dict[int, list[Slot]] = {}
        for slot in self.slots:
            self.by_memory.setdefault(self.states[slot.name].untyped_storage()._cdata, []).append(slot)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        masked, name = masked_state(func, args, self.names), func.overloadpacket.__name__
        if masked is not None:
            self._stands_for(masked[0], result)
        elif name == "_weight_norm_interface":
            self._stands_for(args[0], result[0])
        elif name == "mul" and self.names.get(id(args[0])) in self.directions:
            self._stands_for(args[0], result)
        if name == "convolution":
            self._see_convolution(args[0], args[1], result)
        elif name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            if right.dim() > 1:
                self._see_product(right, right.dim() - 2, (left, left.dim() - 1), (result, result.dim() - 1))
            row, vector = (1, 0) if right.dim() == 1 else (2, right.dim() - 2)
            self._see_product(left, left.dim() - 1, (right, vector), (result, result.dim() - row))
        return result

    def _stands_for(self, weight: Tensor, result: Tensor) -> None:
        """A masked or computed weight stands for the parameter; kept alive, so that its memory is not reused."""
        slots = self.by_memory.get(weight.untyped_storage()._cdata)
        if slots:
            self.by_memory[result.untyped_storage()._cdata] = slots
            self.alive.append(result)

    def forget_masked(self) -> None:
        """The masked weights of this batch; the next has its own."""
        for result in self.alive:
            del self.by_memory[result.untyped_storage()._cdata]
        self.alive.clear()

    def _see_convolution(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        for slot in self.by_memory.get(weight.untyped_storage()._cdata, ()):
            state, values = self.states[slot.name], result if slot.role == "producer" else x
            if weight.shape == state.shape and values.shape[1] == len(slot.ids):
                self._note(slot, 0, values, 1)

    def _see_product(self, weight: Tensor, inner: int, read: tuple[Tensor, int], made: tuple[Tensor, int]) -> None:
        """A factor that is a weight, or a part of one, has the channels that it reads along ``inner``."""
        outer = 2 * weight.dim() - 3 - inner
        for slot in self.by_memory.get(weight.untyped_storage()._cdata, ()):
            state = self.states[slot.name]
            (values, dim), along = (made, outer) if slot.role == "producer" else (read, inner)
            offset, size = int(weight.storage_offset()) - int(state.storage_offset()), state.shape[slot.dim]
            if slot.blocks > 1 or not 0 <= offset < state.numel() or weight.stride(along) != state.stride(slot.dim):
                continue
            start = offset // max(state.stride(slot.dim), 1) % size
            if start + weight.shape[along] <= size:
                self._note(slot, start, values, dim)

    def _note(self, slot: Slot, start: int, values: Tensor, dim: int) -> None:
        place = Slot(name=slot.name, dim=dim, ids=slot.ids)
        entries = slice(start, start + values.shape[dim])
        self.sums[slot.key][entries] += entry_sums(self.measure(values), place).cpu().numpy()
        self.counts[slot.key][entries] += values.numel() / max(values.shape[dim], 1)


def readers(context: Context, *roles: str) -> list[Slot]:
    """The slots of layers that read channels, and of weights that the forward may multiply with by itself."""
    shapes = context.graph.state_shapes
    direct = [slot for slot in context.slots(("follower",)) if len(shapes.get(slot.name, ())) > 1]
    return context.slots(roles or READERS) + direct


def channel_means(
    context: Context, criterion: str, slots: Iterable[Slot], measure: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Slot, np.ndarray]]:
    """For each slot that ran on the data: the mean of ``measure(values)`` for each of its entries."""
    data = context.required_data(criterion)
    watch = _Watch(context, slots, measure)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(undisturbed(context.model, training=False))
        stack.enter_context(plain_recurrence(context.model))
        stack.enter_context(torch.no_grad())
        for batch in data:
            with watch:
                data.forward(context.model, batch)
            watch.forget_masked()
    for slot in watch.slots:
        if watch.counts[slot.key].all():
            means = watch.sums[slot.key] / watch.counts[slot.key]
            if not np.isfinite(means).all():
                verb = "makes" if slot.role == "producer" else "reads"
                raise ConfigError(
                    f"importance={criterion!r}: what {slot.name} {verb} has NaN or infinity in "
                    f"{int((~np.isfinite(means)).sum())} of {len(means)} channels: mend weights or data"
                )
            yield slot, means


def read_or_made(
    context: Context, criterion: str, measure: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Slot, np.ndarray]]:
    """Means of what is read; where nothing reads a channel (queries and keys), of what its layer makes."""
    of, read = context.graph.resolved.of, np.zeros(len(context.wanted), dtype=bool)
    for slot in context.slots(READERS):
        read[of(slot)] = True
    makers = [slot for slot in context.slots(("producer",)) if (context.wanted & ~read)[of(slot)].any()]
    found = list(channel_means(context, criterion, readers(context) + makers, measure))
    for slot, _ in found:
        if slot.role != "producer":
            read[of(slot)] = True
    for slot, means in found:
        if slot.role != "producer" or (context.wanted & ~read)[of(slot)].any():
            yield slot, means
