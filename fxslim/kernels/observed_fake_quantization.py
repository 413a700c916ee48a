# SPDX-License-Identifier: Apache-2.0
"""observe_fake_quantize: observe a tensor's range, update the running one, and quantize to the result."""

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.arguments import (
    as_parameter,
    check_axis,
    check_grid,
    check_input,
    check_symmetric,
    in_order,
    lies_channels_last,
    math_dtype,
)
from fxslim.kernels.clip_masks import pack_mask, register_masked_backward
from fxslim.kernels.observation import min_max_reference
from fxslim.kernels.quantization_grid import grid_from_range, quantize_on_grid

torch.library.define(
    "fxslim::observe_fake_quantize",
    "(Tensor x, Tensor range_min, Tensor range_max, int quant_min, int quant_max, float? averaging,"
    " bool symmetric, int? axis, bool channels_last, bool save_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _updated(old: Tensor, now: Tensor, averaging: float | None, smaller: bool) -> Tensor:
    if averaging is None:
        # Adding 0 turns -0.0 into 0.0.
        return (torch.minimum(old, now) if smaller else torch.maximum(old, now)) + 0.0
    if averaging == 1.0:
        return now
    return torch.where(torch.isinf(old), now, old + (now - old) * averaging)


def _reference(
    x: Tensor,
    range_min: Tensor,
    range_max: Tensor,
    quant_min: int,
    quant_max: int,
    averaging: float | None,
    symmetric: bool,
    axis: int | None,
    channels_last: bool,
    save_mask: bool,
) -> tuple[Tensor, ...]:
    x = in_order(x, channels_last)
    low, high = range_min.clone(), range_max.clone()
    if x.numel() > 0:
        now_min, now_max = min_max_reference(x, axis, channels_last)
        low = _updated(low, now_min.reshape(-1), averaging, smaller=True)
        high = _updated(high, now_max.reshape(-1), averaging, smaller=False)
    scale, zero_point = grid_from_range(low, high, quant_min, quant_max, symmetric)
    y, kept = quantize_on_grid(x, scale, zero_point, quant_min, quant_max, axis, keep=save_mask)
    mask = x.new_empty(0, dtype=torch.uint8) if kept is None else pack_mask(kept, channels_last)
    return y, low, high, scale, zero_point, mask


torch.library.impl("fxslim::observe_fake_quantize", "default", _reference)


@torch.library.register_fake("fxslim::observe_fake_quantize")
def _fake(x, range_min, range_max, quant_min, quant_max, averaging, symmetric, axis, channels_last, save_mask):  # type: ignore[no-untyped-def]
    size = (x.numel() + 7) // 8 if save_mask else 0
    ranges = [torch.empty_like(range_min) for _ in range(3)]
    zero_point = torch.empty_like(range_min, dtype=torch.int32)
    return torch.empty_like(in_order(x, channels_last)), *ranges, zero_point, x.new_empty(size, dtype=torch.uint8)


def never_clips(averaging: float | None, symmetric: bool) -> bool:
    """A symmetric grid made from the very data it quantizes: its gradient is the identity."""
    return symmetric and averaging == 1.0


register_masked_backward("fxslim::observe_fake_quantize", lambda *inputs: never_clips(inputs[5], inputs[6]))


def observe_fake_quantize(
    x: Tensor,
    range_min: Tensor | float,
    range_max: Tensor | float,
    quant_min: int,
    quant_max: int,
    *,
    averaging: float | None = 0.01,
    symmetric: bool = False,
    axis: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fake-quantize x on the grid of its observed range; returns (y, range_min, range_max, scale, zero_point).

    The new range is ``old + averaging * (observed - old)``; an infinite old value means nothing was
    observed yet. ``averaging=1.0`` forgets the past, ``None`` keeps running extrema. The new range is
    returned, not stored. With ``averaging=1.0, symmetric=True`` nothing is ever clipped and the gradient
    is the identity, whatever the data; otherwise it is 0 where the grid clipped. An empty x leaves the
    range as it was. NaN or infinity in the data (or a range too wide for its dtype) makes scale and result
    NaN.

    >>> nothing = torch.tensor([torch.inf]), torch.tensor([-torch.inf])
    >>> observe_fake_quantize(torch.tensor([-1.0, 2.0]), *nothing, -128, 127, averaging=1.0)[3]
    tensor([0.0118])
    """
    check_input(x)
    axis = check_axis(axis, x)
    check_grid(quant_min, quant_max)
    if averaging is not None and (isinstance(averaging, bool) or not isinstance(averaging, int | float)):
        raise DtypeError(f"averaging must be a number or None, got {averaging!r}")
    if averaging is not None and not 0.0 < averaging <= 1.0:
        raise ConfigError(f"averaging={averaging} must be in (0, 1], or None for running extrema")
    if symmetric:
        check_symmetric(quant_min, quant_max)
    low = as_parameter(range_min, "range_min", x, axis, math_dtype(x)).detach()
    high = as_parameter(range_max, "range_max", x, axis, math_dtype(x)).detach()
    save_mask = torch.is_grad_enabled() and x.requires_grad and not never_clips(averaging, symmetric)
    outputs = torch.ops.fxslim.observe_fake_quantize(
        x, low, high, quant_min, quant_max, averaging, symmetric, axis, lies_channels_last(x), save_mask
    )
    return outputs[:5]
