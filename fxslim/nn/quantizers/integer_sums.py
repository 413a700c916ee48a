# SPDX-License-Identifier: Apache-2.0
"""Sums of integer products, put on the grid behind them as integer kernels do it.

Such a kernel has a whole number of steps (the scale of the input times that of the weight), multiplies it by one factor
and rounds. A float layer's result is the same number but for its last places, which put some values on the other side
of a middle. Recovering the whole number first leaves nothing to chance, up to the 2^24 steps that float32 tells apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fxslim.nn.quantizers.gradient_routes import straight_through

# Sums of which an output's step holds more than this are as good as real numbers.
_FINEST = 2.0**-30


class Channels(NamedTuple):
    """Where a layer's output channels are in a tensor: ``num`` from ``first`` on along ``dim``, each ``repeat`` times.

    Without ``num``, all. ``low``, ``high``: what a clamp cut off the sums to, where that is no 0: it need not be a
    whole number of steps. ``start``: where along ``dim`` they begin, in what is joined from several layers' sums.
    ``order``: the channel at each place, where they are in no order that the others tell.
    """

    dim: int
    first: int = 0
    num: int | None = None
    repeat: int = 1
    low: float | None = None
    high: float | None = None
    start: int | None = None
    order: tuple[int, ...] | None = None

    @classmethod
    def from_list(cls, values: list[Any]) -> Self:
        """As a saved plan holds it."""
        plain: Any = [tuple(value) if isinstance(value, list) else value for value in values]
        return cls(*plain)

    @property
    def length(self) -> int | None:
        """How many places they take along ``dim``."""
        if self.order is not None:
            return len(self.order)
        return None if self.num is None else self.num * self.repeat


def as_integer_kernels(x: Tensor, step: Tensor, channels: Channels, scale: Tensor) -> Tensor:
    """x, which is whole numbers of ``step`` but for rounding, in whole numbers of ``scale``; its gradient as ever.

    >>> sums = torch.tensor([[0.49999, 1.2]])
    >>> as_integer_kernels(sums, torch.tensor([0.125, 0.5]), Channels(-1), torch.tensor(1.0))
    tensor([[0., 1.]])
    """
    if x.dtype not in (torch.float32, torch.float64):
        return x
    known = _along(x, step, channels)
    if known is None:
        return x
    with torch.no_grad():
        scale = scale.to(x.dtype)
        fine = known.to(x.dtype)
        fine = torch.where(fine >= scale * _FINEST, fine, scale)
        value = x.detach().div(fine).round_().mul_(fine / scale).round_().mul_(scale)
        if channels.high is not None:
            value = torch.where(x >= channels.high, x, value)
        if channels.low is not None:
            value = torch.where(x <= channels.low, x, value)
    return straight_through(value, x) if torch.is_grad_enabled() and x.requires_grad else value


def joined_sums(sums: Mapping[Channels, Tensor], shape: Sequence[int]) -> dict[Channels, Tensor]:
    """Of parts side by side one vector of steps, with 0 where there is no part: there the grid itself is the step.

    >>> parts = {Channels(-1, 0, 2, start=1): torch.tensor([0.5, 0.25])}
    >>> list(joined_sums(parts, (4, 4)).values())
    [tensor([0.0000, 0.5000, 0.2500, 0.0000])]
    """
    made: dict[Channels, Tensor] = {}
    for channels, step in sums.items():
        if channels.start is None:
            made[channels] = step
            continue
        place, end = channels.start, channels.start + (channels.length or 0)
        steps = _steps(step, channels)
        if len(shape) < -channels.dim or end > shape[channels.dim] or steps.numel() not in (1, end - place):
            continue
        whole = Channels(channels.dim, low=channels.low, high=channels.high)
        made.setdefault(whole, step.new_zeros(shape[channels.dim]))[place:end] = steps
    return made


def _steps(step: Tensor, channels: Channels) -> Tensor:
    """Along the places that these channels take; one for all where the layer has one."""
    if step.numel() != 1 and channels.order is not None:
        return step[list(channels.order)]
    if step.numel() != 1 and channels.num is not None:
        step = step[channels.first : channels.first + channels.num]
    return step.reshape(-1) if step.numel() == 1 else step.repeat_interleave(channels.repeat)


def _along(x: Tensor, step: Tensor, channels: Channels) -> Tensor | None:
    """The steps in the shape of x; None where they are those of another tensor."""
    steps = _steps(step, channels)
    if steps.numel() == 1:
        return steps.reshape(())
    dim = channels.dim
    if x.dim() < -dim or steps.numel() != x.shape[dim]:
        return None
    return steps.reshape(-1, *[1] * (-dim - 1))
