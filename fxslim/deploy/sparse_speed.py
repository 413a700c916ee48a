# SPDX-License-Identifier: Apache-2.0
"""The rule by which a layer stays dense: where skipping its zero blocks would be slower than torch's own kernels."""

import torch

from fxslim.kernels.block_sparse_convolution import KERNEL_DTYPES

# Set by `python -m benchmarks.kernels.block_sparse`, which times layers beside torch's dense ones.
# Fewer zero blocks than this do not pay, of float weights and of bytes.
LEAST_ZERO = {torch.float32: 0.15, torch.bfloat16: 0.15, torch.float16: 0.15, torch.int8: 0.15}
# Fewer channels than this do not fill the kernel's registers.
LEAST_INPUTS = 32
LEAST_FILTERS = 16


def why_dense(shape: tuple[int, ...], kept: float, dtype: torch.dtype, device: str = "cpu") -> str:
    """Why a layer is faster dense; "" where it is not. ``kept``: the fraction of blocks that are not zero.

    ``dtype``: that of the stored weight, int8 where inputs and weights are bytes.

    >>> why_dense((64, 64, 3, 3), 0.5, torch.float32), why_dense((64, 3, 3, 3), 0.5, torch.float32)
    ('', '3 input channels, fewer than 32')
    """
    kernels = (torch.int8,) if dtype == torch.int8 and device == "cpu" else KERNEL_DTYPES.get(device, ())
    if dtype not in kernels:
        return f"no block-sparse kernel for {dtype} on {device}"
    if 1 - kept < LEAST_ZERO[dtype]:
        return f"{1 - kept:.0%} of its blocks are zero, less than {LEAST_ZERO[dtype]:.0%}"
    if shape[1] < LEAST_INPUTS:
        return f"{shape[1]} input channels, fewer than {LEAST_INPUTS}"
    if shape[0] < LEAST_FILTERS:
        return f"{shape[0]} filters, fewer than {LEAST_FILTERS}"
    return ""
