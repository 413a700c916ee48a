# SPDX-License-Identifier: Apache-2.0
"""block_sparse_conv2d: a convolution that skips the blocks of its weight that are zero."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fxslim.errors import DtypeError
from fxslim.kernels.arguments import check_input
from fxslim.kernels.block_arguments import check_blocks, check_convolution, output_shape
from fxslim.kernels.block_layout import BlockSizes, unpack_blocks

torch.library.define(
    "fxslim::block_sparse_conv2d",
    "(Tensor input, Tensor blocks, Tensor places, Tensor starts, Tensor? bias, int num_out, int cout,"
    " int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool relu) -> Tensor",
)


@torch.no_grad()
def _reference(
    input: Tensor,
    blocks: Tensor,
    places: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    num_out: int,
    cout: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
) -> Tensor:
    sizes = BlockSizes.of((num_out, input.shape[3], *kernel_size), blocks.shape[2], cout)
    weight = unpack_blocks(blocks, places, starts, sizes).reshape(num_out, input.shape[3], *kernel_size)
    top, left, bottom, right = padding
    x = F.pad(input.permute(0, 3, 1, 2), (left, right, top, bottom))
    with torch.autocast(input.device.type, enabled=False):
        output = F.conv2d(x, weight, bias, stride, 0, dilation)
    if relu:
        output = output.relu_()
    # No view: what is added to it in place may carry a gradient.
    return output.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


torch.library.impl("fxslim::block_sparse_conv2d", "default", _reference)


@torch.library.register_fake("fxslim::block_sparse_conv2d")
def _fake(input, blocks, places, starts, bias, num_out, cout, kernel_size, stride, padding, dilation, relu):  # type: ignore[no-untyped-def]
    return input.new_empty(output_shape(input.shape, num_out, kernel_size, stride, padding, dilation))


_operator = torch.ops.fxslim.block_sparse_conv2d.default

# What kernels take, by device; on others the dispatcher finds the reference.
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


def _has_kernel(input: Tensor) -> bool:
    """Whether the operator computes with such inputs; the reference takes the others."""
    return input.dtype in KERNEL_DTYPES.get(input.device.type, (input.dtype,))


def block_sparse_conv2d(
    input: Tensor,
    blocks: Tensor,
    places: Tensor,
    starts: Tensor,
    bias: Tensor | None = None,
    *,
    num_out: int,
    num_in: int,
    cout: int = 64,
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    """Convolve (batch, height, width, channels) with the blocks of ``pack_blocks``; the result is laid out alike.

    ``padding`` is that above, left, below and right. ``relu`` clamps at 0 what is returned. It carries no gradient, and
    autocast changes nothing. Kernels take float32 on the CPU, and bfloat16 and float16 there and on CUDA; for the rest
    the weight is put together and convolved with. NaN and infinity that only skipped blocks would read need not show.

    >>> from fxslim.kernels.block_layout import pack_blocks
    >>> block_sparse_conv2d(torch.ones(1, 1, 1, 2), *pack_blocks(torch.tensor([[1.0, 2.0]])), num_out=1, num_in=2)
    tensor([[[[3.]]]])
    """
    check_input(input, "input")
    for name, tensor in (("blocks", blocks), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise DtypeError(f"{name} must be {input.dtype} as the input is, got {tensor.dtype}")
    check_convolution(input, num_in, kernel_size, stride, padding, dilation)
    check_blocks(blocks, places, starts, bias, num_out, cout, dims=4)
    convolve = _operator if _has_kernel(input) else _reference
    with torch.no_grad():
        return convolve(
            input, blocks, places, starts, bias, num_out, cout, list(kernel_size), list(stride), list(padding),
            list(dilation), relu,
        )  # fmt: skip
