# SPDX-License-Identifier: Apache-2.0
"""block_sparse_conv2d: a convolution that skips the blocks of its weight that are zero."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.block_layout import PANEL, BlockSizes, unpack_blocks

torch.library.define(
    "fxslim::block_sparse_conv2d",
    "(Tensor input, Tensor blocks, Tensor places, Tensor starts, Tensor? bias, int num_out, int cout,"
    " int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool relu) -> Tensor",
)


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
    # Negative numbers would crop.
    x = F.pad(input.permute(0, 3, 1, 2), (left, right, top, bottom))
    output = F.conv2d(x, weight, bias, stride, 0, dilation)
    if relu:
        output = output.relu_()
    # No view: what is added to it in place may carry a gradient.
    return output.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


torch.library.impl("fxslim::block_sparse_conv2d", "default", _reference)


def output_shape(
    shape: Sequence[int],
    num_out: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Of an input (batch, height, width, channels)."""
    top, left, bottom, right = padding
    return [
        shape[0],
        (shape[1] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1,
        (shape[2] + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1,
        num_out,
    ]


@torch.library.register_fake("fxslim::block_sparse_conv2d")
def _fake(input, blocks, places, starts, bias, num_out, cout, kernel_size, stride, padding, dilation, relu):  # type: ignore[no-untyped-def]
    return input.new_empty(output_shape(input.shape, num_out, kernel_size, stride, padding, dilation))


def check_convolution(
    input: Tensor, num_in: int, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> None:  # fmt: skip
    """Raise for what no convolution takes."""
    if input.dim() != 4 or input.shape[3] != num_in:
        raise ConfigError(
            f"input has shape {tuple(input.shape)}: it must be (batch, height, width, channels), of {num_in} channels"
        )
    for name, values, count, least in (
        ("kernel_size", kernel_size, 2, 1),
        ("stride", stride, 2, 1),
        ("dilation", dilation, 2, 1),
        ("padding", padding, 4, 0),
    ):
        if len(values) != count or any(value < least for value in values):
            raise ConfigError(f"{name}={list(values)} must be {count} integers >= {least}")
    given = output_shape(input.shape, 1, kernel_size, stride, padding, dilation)
    if given[1] < 1 or given[2] < 1:
        raise ConfigError(
            f"an input of {input.shape[1]}x{input.shape[2]}, padded by {list(padding)}, is smaller than the kernel "
            f"{list(kernel_size)} with dilation {list(dilation)}"
        )


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

    ``padding`` is that above, left, below and right. ``relu`` clamps at 0 what is returned. It carries no gradient.
    Native where everything is float32 (on CUDA bfloat16); elsewhere the weight is put together and convolved with.

    >>> from fxslim.kernels.block_layout import pack_blocks
    >>> block_sparse_conv2d(torch.ones(1, 1, 1, 2), *pack_blocks(torch.tensor([[1.0, 2.0]])), num_out=1, num_in=2)
    tensor([[[[3.]]]])
    """
    for name, tensor in (("blocks", blocks), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise DtypeError(f"{name} must be {input.dtype} as the input is, got {tensor.dtype}")
    check_convolution(input, num_in, kernel_size, stride, padding, dilation)
    check_blocks(blocks, places, starts, bias, num_out, cout)
    with torch.no_grad():
        return torch.ops.fxslim.block_sparse_conv2d(
            input, blocks, places, starts, bias, num_out, cout, kernel_size, stride, padding, dilation, relu
        )


def check_blocks(blocks: Tensor, places: Tensor, starts: Tensor, bias: Tensor | None, num_out: int, cout: int) -> None:
    """Raise where the parts of a packed weight do not belong together."""
    if cout < 1 or num_out < 1:
        raise ConfigError(f"num_out={num_out} and cout={cout} must be at least 1")
    panels, over_filters = -(-min(cout, num_out) // PANEL), -(-num_out // cout)
    if blocks.dim() not in (4, 5) or blocks.shape[1] != panels or blocks.shape[3] != PANEL:
        raise ConfigError(f"blocks have shape {tuple(blocks.shape)}: {cout} of {num_out} filters are {panels} panels")
    if tuple(places.shape) != (len(blocks), 2) or tuple(starts.shape) != (over_filters + 1,):
        raise ConfigError(
            f"places {tuple(places.shape)} and starts {tuple(starts.shape)} must be {(len(blocks), 2)} and "
            f"{(over_filters + 1,)}"
        )
    if places.dtype != torch.int32 or starts.dtype != torch.int32:
        raise DtypeError(f"places and starts must be int32, got {places.dtype} and {starts.dtype}")
    if bias is not None and tuple(bias.shape) != (num_out,):
        raise ConfigError(f"bias has shape {tuple(bias.shape)}, not ({num_out},)")
