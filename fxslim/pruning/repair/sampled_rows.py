# SPDX-License-Identifier: Apache-2.0
"""What a convolution or linear layer reads, as rows of a matrix: one for each sampled place of its outputs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Fitted = Convolution | nn.Linear


def draw_places(total: int, num: int, key: Iterable[int]) -> Tensor:
    """At most ``num`` of ``total`` places in random order, the same for the same key.

    >>> draw_places(3, 10, (0, 1)).sort().values, len(draw_places(100, 10, (0, 1)).unique())
    (tensor([0, 1, 2]), 10)
    """
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number) % (1 << 62)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num]


def output_shape(layer: Fitted, result: Tensor) -> tuple[int, ...]:
    """The places of a layer's outputs: the batch and all that is not a channel."""
    if isinstance(layer, nn.Linear):
        return tuple(result.shape[:-1])
    rank = layer.weight.dim() - 2
    batch = result.shape[0] if result.dim() == rank + 2 else 1
    return (batch, *result.shape[result.dim() - rank :])


def rows_read(layer: Fitted, x: Tensor, shape: tuple[int, ...], places: Tensor, taps: int) -> Tensor:
    """What the layer reads for the outputs at these places, as groups x rows x columns.

    ``taps`` is 1 for all that an output reads, in the order of the weight; else each row is one of the taps of each
    channel, in turn: those of the kernel, or as many neighbours in the input of a linear layer.

    >>> layer, x = nn.Conv1d(2, 3, 3, padding=1), torch.arange(8.0).view(1, 2, 4)
    >>> rows_read(layer, x, (1, 4), torch.tensor([0, 3]), 1)
    tensor([[[0., 0., 1., 0., 4., 5.],
             [2., 3., 0., 6., 7., 0.]]])
    >>> rows_read(layer, x, (1, 4), torch.tensor([0, 3]), 3)
    tensor([[[0., 0.],
             [3., 7.]]])
    """
    places = places.to(x.device)
    turn = torch.arange(len(places), device=x.device) % taps
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).index_select(0, places)
        if taps > 1:
            rows = rows.view(len(rows), -1, taps)[torch.arange(len(rows), device=x.device), :, turn]
        return rows.unsqueeze(0)
    if x.dim() < layer.weight.dim():
        x = x.unsqueeze(0)
    image, *starts = torch.unravel_index(places, shape)
    offsets = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in layer.kernel_size))
    offsets = offsets.view(-1, len(layer.kernel_size))
    index = [image.unsqueeze(1)]
    for dim, start in enumerate(starts):
        first = (start * layer.stride[dim]).unsqueeze(1)
        offset = offsets[:, dim] * layer.dilation[dim]
        index.append(first + (offset[turn].unsqueeze(1) if taps > 1 else offset))
    values = _padded(layer, x).movedim(1, -1)[tuple(index)]
    per_group = values.shape[2] // layer.groups
    return values.transpose(1, 2).reshape(len(places), layer.groups, per_group * values.shape[1]).transpose(0, 1)


def _padded(layer: Convolution, x: Tensor) -> Tensor:
    """The input as the convolution reads it; by the same numbers that its own forward uses."""
    widths = layer._reversed_padding_repeated_twice
    if not any(widths):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(x, tuple(widths), mode=mode)


def outputs_at(layer: Fitted, result: Tensor, places: Tensor) -> Tensor:
    """What the layer returned at these places, as rows x channels."""
    if isinstance(layer, nn.Linear):
        by_place = result.reshape(-1, result.shape[-1])
    else:
        by_place = result.movedim(result.dim() - layer.weight.dim() + 1, -1)
        by_place = by_place.reshape(-1, by_place.shape[-1])
    return by_place.index_select(0, places.to(result.device))
