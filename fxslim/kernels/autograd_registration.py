# SPDX-License-Identifier: Apache-2.0
"""Registers backwards of operators: what torch.library.register_autograd does, with less Python around each call.

Training calls these operators for every layer in every step, on tensors that are often small.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_autograd(op_name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """``backward(ctx, *grads)`` gives one gradient for each argument, after ``setup_context(ctx, inputs, output)``.

    Only the first output has a gradient.

    ``op_name``: an operator of fxslim without keyword-only arguments and without defaults.
    """
    operator = getattr(torch.ops.fxslim, op_name.removeprefix("fxslim::")).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = operator(*args)
        setup_context(ctx, inputs=args, output=result)
        # Else each backward makes zeros for the outputs that have no gradient.
        ctx.set_materialize_grads(False)
        return result

    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        return (None,) * len(ctx.needs_input_grad) if grads[0] is None else backward(ctx, *grads)

    made: Any = type(
        f"fxslim_{operator.__name__.split('.')[0]}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(guarded)},
    )

    def dispatched(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return made.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    torch.library.impl(op_name, "Autograd", dispatched)


def without_gradient(op_name: str) -> None:
    """Nothing that the operator gives carries a gradient, whatever it is given; calls cost no Python."""
    torch.library.impl(op_name, "Autograd", torch.library.fallthrough_kernel)
