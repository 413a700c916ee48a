# SPDX-License-Identifier: Apache-2.0
"""Clip masks: one bit per element, set where quantization did not clip.

The bits follow the elements in one of two orders, which the operator is told: contiguous, or channels
last. So a mask means the same whatever memory format the gradient arrives in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels.arguments import in_order
from fxslim.kernels.autograd_registration import register_autograd

# Multiplying eight bytes of 0 or 1 by this puts byte k into bit k of the highest byte.
_GATHER = 0x0102040810204080
# Eight copies of a byte, each keeping another bit: byte k of the product is not 0 where bit k is set.
_SPREAD = 0x0101010101010101
_PICK = 0x8040201008040201 - (1 << 64)


def walk(x: Tensor, channels_last: bool) -> Tensor:
    """The elements of x in the mask's order, as a vector."""
    if channels_last:
        x = x.movedim(1, -1)
    return x.reshape(-1)


def pack_mask(kept: Tensor, channels_last: bool) -> Tensor:
    """Bits of a bool tensor; the last byte is filled with zeros.

    >>> pack_mask(torch.tensor([True, False, True]), channels_last=False)
    tensor([5], dtype=torch.uint8)
    """
    flags = walk(kept, channels_last).view(torch.uint8)
    short = -flags.numel() % 8
    if short or flags.storage_offset() % 8:
        flags = torch.cat([flags, flags.new_zeros(short)])
    eights = flags.view(torch.int64)
    return (eights * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(mask: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The bool tensor of this shape that ``pack_mask`` packed, lying in the mask's order."""
    flags = ((mask.to(torch.int64) * _SPREAD) & _PICK).view(torch.uint8).ne(0)
    flags = flags[: shape.numel()]
    if not channels_last:
        return flags.view(shape)
    return flags.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


torch.library.define("fxslim::mask_gradient", "(Tensor grad, Tensor mask, bool channels_last) -> Tensor")


def _reference(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    grad = in_order(grad, channels_last)
    kept = unpack_mask(mask, grad.shape, channels_last)
    return torch.where(kept, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))


torch.library.impl("fxslim::mask_gradient", "default", _reference)


@torch.library.register_fake("fxslim::mask_gradient")
def _fake(grad: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(in_order(grad, channels_last))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])
    ctx.channels_last = inputs[2]


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (mask,) = ctx.saved_tensors
    return torch.ops.fxslim.mask_gradient(grad, mask, ctx.channels_last), None, None


register_autograd("fxslim::mask_gradient", _backward, setup_context=_setup)


def _passes_none(*inputs: Any) -> bool:
    return False


def register_masked_backward(op_name: str, passes_all: Callable[..., bool] = _passes_none) -> None:
    """The gradient of the first argument passes where nothing was clipped, or everywhere where ``passes_all(*inputs)``.

    For operators whose last arguments are ``channels_last`` and ``save_mask``, and whose last output is the mask.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.passes_all = passes_all(*inputs)
        ctx.channels_last, ctx.has_mask = inputs[-2:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[-1])

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rest = [None] * (len(ctx.needs_input_grad) - 1)
        if ctx.passes_all:
            return grad, *rest
        if not ctx.has_mask:
            raise ConfigError(
                f"{op_name} ran without a clip mask (its input did not require grad when the call was made, or when "
                "the graph was exported), so it has no backward: export with an input that requires grad"
            )
        (mask,) = ctx.saved_tensors
        return torch.ops.fxslim.mask_gradient(grad, mask, ctx.channels_last), *rest

    register_autograd(op_name, backward, setup_context=setup)
