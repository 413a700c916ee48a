# SPDX-License-Identifier: Apache-2.0
"""Checks on what the block-sparse convolutions are given: each error names the argument and its value.

Values of ``places`` and ``starts`` are looked at by the kernels on the CPU.
"""

import functools
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
    sizes = tuple(input.shape), num_in, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    # Sizes that are traced can't be remembered.
    (_check_sizes if torch.compiler.is_compiling() else _remembered_sizes)(*sizes)


def _check_sizes(
    shape: tuple[int, ...], num_in: int, kernel_size: tuple[int, ...], stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...],
) -> None:  # fmt: skip
    if num_in < 1 or len(shape) != 4 or shape[3] != num_in:
        raise ConfigError(
            f"input has shape {tuple(shape)}: it must be (batch, height, width, channels), of num_in={num_in} "
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
    given = output_shape(shape, 1, kernel_size, stride, padding, dilation)
    if given[1] < 1 or given[2] < 1:
        raise ConfigError(
            f"an input of {shape[1]}x{shape[2]}, padded by {list(padding)}, is smaller than the kernel "
            f"{list(kernel_size)} with dilation {list(dilation)}"
        )


def check_blocks(
    blocks: Tensor, places: Tensor, starts: Tensor, bias: Tensor | None, num_out: int, cout: int, dims: int
) -> None:
    """Raise where the parts of a packed weight do not belong together; its blocks have ``dims`` dimensions."""
    (_check_parts if torch.compiler.is_compiling() else _remembered_parts)(
        blocks.shape, (places.shape, starts.shape), (places.dtype, starts.dtype),
        None if bias is None else bias.shape, num_out, cout, dims,
    )  # fmt: skip


def _check_parts(
    blocks: torch.Size, shapes: tuple[torch.Size, torch.Size], dtypes: tuple[torch.dtype, torch.dtype],
    bias: torch.Size | None, num_out: int, cout: int, dims: int,
) -> None:  # fmt: skip
    if cout < 1 or num_out < 1:
        raise ConfigError(f"num_out={num_out} and cout={cout} must be at least 1")
    panels, over_filters = -(-min(cout, num_out) // PANEL), -(-num_out // cout)
    if len(blocks) != dims or blocks[1] != panels or blocks[3] != PANEL:
        raise ConfigError(
            f"blocks have shape {tuple(blocks)}: {cout} of {num_out} filters are {panels} panels of {PANEL}, and "
            f"blocks have {dims} dimensions"
        )
    if tuple(shapes[0]) != (blocks[0], 2) or tuple(shapes[1]) != (over_filters + 1,):
        raise ConfigError(
            f"places {tuple(shapes[0])} and starts {tuple(shapes[1])} must be {(blocks[0], 2)} and "
            f"{(over_filters + 1,)}"
        )
    if dtypes != (torch.int32, torch.int32):
        raise DtypeError(f"places and starts must be int32, got {dtypes[0]} and {dtypes[1]}")
    if bias is not None and tuple(bias) != (num_out,):
        raise ConfigError(f"bias has shape {tuple(bias)}, not ({num_out},)")


# Looking at sizes costs as much as calling a kernel does.
_remembered_sizes = functools.lru_cache(maxsize=1024)(_check_sizes)
_remembered_parts = functools.lru_cache(maxsize=1024)(_check_parts)
