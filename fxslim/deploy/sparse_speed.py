# SPDX-License-Identifier: Apache-2.0
"""The rule by which a layer stays dense: where skipping its zero blocks would be slower than torch's own kernels."""

from dataclasses import dataclass

import torch

from fxslim.kernels.block_sparse_convolution import KERNEL_DTYPES


@dataclass(frozen=True, kw_only=True)
class Least:
    """What a layer must have so that skipping pays: a fraction of zero blocks, input channels, filters."""

    zero: float
    inputs: int
    filters: int


# Set by `python -m benchmarks.kernels.sparse_rule`, which times deployed layers beside dense ones. Fewer filters than
# two panels leave registers of the float kernel empty; dense kernels of bytes are slower, so those pay earlier.
_OF_FLOATS = Least(zero=0.15, inputs=32, filters=32)
LEAST = {
    torch.float32: _OF_FLOATS,
    torch.bfloat16: _OF_FLOATS,
    torch.float16: _OF_FLOATS,
    torch.int8: Least(zero=0.15, inputs=16, filters=8),
}


def why_dense(shape: tuple[int, ...], kept: float, dtype: torch.dtype, device: str = "cpu") -> str:
    """Why a layer is faster dense; "" where it is not. ``kept``: the fraction of blocks that are not zero.

    ``dtype``: that of the stored weight, int8 where inputs and weights are bytes.

    >>> why_dense((64, 64, 3, 3), 0.5, torch.float32), why_dense((64, 3, 3, 3), 0.5, torch.float32)
    ('', '3 input channels, fewer than 32')
    """
    kernels = (torch.int8,) if dtype == torch.int8 and device == "cpu" else KERNEL_DTYPES.get(device, ())
    if dtype not in kernels:
        return f"no block-sparse kernel for {dtype} on {device}"
    least = LEAST[dtype]
    if 1 - kept < least.zero:
        return f"{1 - kept:.0%} of its blocks are zero, less than {least.zero:.0%}"
    if shape[1] < least.inputs:
        return f"{shape[1]} input channels, fewer than {least.inputs}"
    if shape[0] < least.filters:
        return f"{shape[0]} filters, fewer than {least.filters}"
    return ""
