# SPDX-License-Identifier: Apache-2.0
"""observe_min_max: smallest and largest value of a tensor, or of each channel, in one pass."""

import torch
from torch import Tensor

from fxslim.errors import ConfigError
from fxslim.kernels.arguments import check_axis, check_input, in_order, lies_channels_last, math_dtype
from fxslim.kernels.autograd_registration import without_gradient

torch.library.define("fxslim::observe_min_max", "(Tensor x, int? axis, bool channels_last) -> (Tensor, Tensor)")


def min_max_reference(x: Tensor, axis: int | None, channels_last: bool) -> tuple[Tensor, Tensor]:
    """The definition of ``observe_min_max``, which other references use too."""
    if x.numel() == 0:
        raise ConfigError("x is empty: there is no smallest value")
    dtype = math_dtype(x)
    if axis is None:
        low, high = torch.aminmax(in_order(x, channels_last))
    else:
        others = [d for d in range(x.dim()) if d != axis]
        low, high = (torch.amin(x, others), torch.amax(x, others)) if others else (x, x)
    # Adding 0 turns -0.0, which may come before or after 0.0, into 0.0 (and makes a copy).
    return low.to(dtype) + 0.0, high.to(dtype) + 0.0


torch.library.impl("fxslim::observe_min_max", "default", min_max_reference)


@torch.library.register_fake("fxslim::observe_min_max")
def _fake(x, axis, channels_last):  # type: ignore[no-untyped-def]
    shape = [] if axis is None else [x.shape[axis]]
    return x.new_empty(shape, dtype=math_dtype(x)), x.new_empty(shape, dtype=math_dtype(x))


without_gradient("fxslim::observe_min_max")


def observe_min_max(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value: scalars, or vectors with one entry per channel along ``axis``.

    The results are float32 (float64 for float64 input) and carry no gradient. A NaN in the data makes
    both results of its channel NaN. An empty tensor is an error.

    >>> observe_min_max(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), axis=0)
    (tensor([-2.0000,  0.5000]), tensor([1., 3.]))
    """
    check_input(x)
    axis = check_axis(axis, x)
    # Compiled graphs leave this to the operator: the size may depend on data.
    if not torch.compiler.is_compiling() and x.numel() == 0:
        raise ConfigError(f"x has shape {tuple(x.shape)}: an empty tensor has no smallest value")
    low, high = torch.ops.fxslim.observe_min_max(x.detach(), axis, lies_channels_last(x))
    return low, high
