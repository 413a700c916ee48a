# SPDX-License-Identifier: Apache-2.0
"""Where gradients go: to another tensor than the one shown, or scaled. Values stay as they are, to the last bit."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, through: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0]


class _Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: float) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


def straight_through(value: Tensor, through: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``through``.

    >>> x = torch.tensor(0.7, requires_grad=True)
    >>> y = straight_through(x.round(), 3 * x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (1.0, 3.0)
    """
    return _StraightThrough.apply(value.detach(), through)


def with_scaled_gradient(value: Tensor, factor: float) -> Tensor:
    """``value``, whose gradient is multiplied by ``factor``."""
    return _Scaled.apply(value, factor)
