# SPDX-License-Identifier: Apache-2.0
"""Checks on what the block-sparse convolutions are given: each error names the argument and its value.

Values of ``places`` and ``starts`` are looked at by the kernels on the CPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.block_layout import PANEL


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


def check_convolution(
    input: Tensor, num_in: int, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> None:  # fmt: skip
    """Raise for what no convolution takes."""
    if num_in < 1 or input.dim() != 4 or input.shape[3] != num_in:
        raise ConfigError(
            f"input has shape {tuple(input.shape)}: it must be (batch, height, width, channels), of num_in={num_in} "
            "channels, at least 1"
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


def check_blocks(
    blocks: Tensor, places: Tensor, starts: Tensor, bias: Tensor | None, num_out: int, cout: int, dims: int
) -> None:
    """Raise where the parts of a packed weight do not belong together; its blocks have ``dims`` dimensions."""
    if cout < 1 or num_out < 1:
        raise ConfigError(f"num_out={num_out} and cout={cout} must be at least 1")
    panels, over_filters = -(-min(cout, num_out) // PANEL), -(-num_out // cout)
    if blocks.dim() != dims or blocks.shape[1] != panels or blocks.shape[3] != PANEL:
        raise ConfigError(
            f"blocks have shape {tuple(blocks.shape)}: {cout} of {num_out} filters are {panels} panels of {PANEL}, and "
            f"blocks have {dims} dimensions"
        )
    if tuple(places.shape) != (len(blocks), 2) or tuple(starts.shape) != (over_filters + 1,):
        raise ConfigError(
            f"places {tuple(places.shape)} and starts {tuple(starts.shape)} must be {(len(blocks), 2)} and "
            f"{(over_filters + 1,)}"
        )
    if places.dtype != torch.int32 or starts.dtype != torch.int32:
        raise DtypeError(f"places and starts must be int32, got {places.dtype} and {starts.dtype}")
    if bias is not None and tuple(bias.shape) != (num_out,):
        raise ConfigError(f"bias has shape {tuple(bias.shape)}, not ({num_out},)")
