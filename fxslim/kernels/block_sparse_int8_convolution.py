# SPDX-License-Identifier: Apache-2.0
"""block_sparse_conv2d_int8: bytes convolved with the blocks of a weight that are not zero."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.block_arguments import check_blocks, check_convolution, output_shape
from fxslim.kernels.block_layout import PANEL, QUAD, BlockSizes, unpack_blocks

torch.library.define(
    "fxslim::block_sparse_conv2d_int8",
    "(Tensor input, Tensor scale, int zero_point, int quant_min, int quant_max, Tensor blocks, Tensor places,"
    " Tensor starts, Tensor factor, Tensor? bias, int num_out, int cout, int cin, int[] kernel_size, int[] stride,"
    " int[] padding, int[] dilation, bool relu) -> Tensor",
)


@torch.no_grad()
def _reference(
    input: Tensor,
    scale: Tensor,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    blocks: Tensor,
    places: Tensor,
    starts: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    num_out: int,
    cout: int,
    cin: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
) -> Tensor:
    sizes = BlockSizes.of((num_out, input.shape[3], *kernel_size), cin, cout)
    weight = unpack_blocks(blocks, places, starts, sizes).reshape(num_out, input.shape[3], *kernel_size)
    lowest = quant_min - zero_point
    steps = (input / scale).round_().clamp_(lowest, quant_max - zero_point).nan_to_num_(nan=lowest)
    top, left, bottom, right = padding
    x = F.pad(steps.permute(0, 3, 1, 2).double(), (left, right, top, bottom))
    # Sums of whole numbers are exact in float64.
    sums = F.conv2d(x, weight.double(), None, stride, 0, dilation).permute(0, 2, 3, 1)
    output = sums.float() * factor
    if bias is not None:
        output = output + bias
    # No view: what is added to it in place may carry a gradient.
    return (output.relu_() if relu else output).clone(memory_format=torch.contiguous_format)


torch.library.impl("fxslim::block_sparse_conv2d_int8", "default", _reference)


@torch.library.register_fake("fxslim::block_sparse_conv2d_int8")
def _fake(  # type: ignore[no-untyped-def]
    input, scale, zero_point, quant_min, quant_max, blocks, places, starts, factor, bias, num_out, cout, cin,
    kernel_size, stride, padding, dilation, relu,
):  # fmt: skip
    return input.new_empty(output_shape(input.shape, num_out, kernel_size, stride, padding, dilation))


def block_sparse_conv2d_int8(
    input: Tensor,
    scale: Tensor,
    zero_point: int,
    quant_min: int,
    quant_max: int,
    blocks: Tensor,
    places: Tensor,
    starts: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    *,
    num_out: int,
    num_in: int,
    cout: int = 64,
    cin: int = 32,
    kernel_size: Sequence[int] = (1, 1),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    """Round a float32 input to its grid of bytes and convolve it with int8 blocks: float32.

    The input (batch, height, width, channels) becomes ``round(input / scale) + zero_point``, clamped to
    ``quant_min`` and ``quant_max``; sums of 32 bits are exact, and become ``sum * factor + bias``, where ``factor`` is
    the product of both scales for each output. NaN becomes ``quant_min``. It carries no gradient.
    """
    for name, tensor in (("input", input), ("factor", factor), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise DtypeError(f"{name} must be float32, got {tensor.dtype}")
    if blocks.dtype != torch.int8:
        raise DtypeError(f"blocks must be int8, got {blocks.dtype}")
    if not (0 < quant_max - quant_min <= 255 and quant_min <= zero_point <= quant_max):
        raise ConfigError(f"grid {quant_min} to {quant_max} with zero point {zero_point}: at most 256 steps around it")
    if scale.numel() != 1 or tuple(factor.shape) != (num_out,):
        raise ConfigError(f"scale {tuple(scale.shape)} must be one number, factor {tuple(factor.shape)} ({num_out},)")
    check_convolution(input, num_in, kernel_size, stride, padding, dilation)
    check_blocks(blocks, places, starts, bias, num_out, cout, dims=5)
    _check_depth(
        blocks, num_in, cin, max(zero_point - quant_min, quant_max - zero_point) * 128 * math.prod(kernel_size)
    )
    with torch.no_grad():
        return torch.ops.fxslim.block_sparse_conv2d_int8(
            input, scale, zero_point, quant_min, quant_max, blocks, places, starts, factor, bias, num_out, cout,
            min(cin, num_in), kernel_size, stride, padding, dilation, relu,
        )  # fmt: skip


def _check_depth(blocks: Tensor, num_in: int, cin: int, largest: int) -> None:
    """Raise where blocks hold other channels than they should, or sums of ``largest`` for each might not fit."""
    quads = -(-min(cin, num_in) // QUAD)
    if cin < 1 or tuple(blocks.shape[2:]) != (quads, PANEL, QUAD):
        raise ConfigError(f"blocks have shape {tuple(blocks.shape)}: cin={cin} of {num_in} channels are {quads} quads")
    if num_in * largest >= 2**31:
        raise ConfigError(f"sums of {num_in} channels may reach {num_in * largest}, which 32 bits do not hold")
