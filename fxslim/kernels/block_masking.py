# SPDX-License-Identifier: Apache-2.0
"""block_mask: blocks of filters x input channels dropped, those of the smallest mean magnitude."""

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.arguments import check_input, in_order, lies_channels_last

torch.library.define(
    "fxslim::block_mask",
    "(Tensor weight, int num_removed, int cin, int cout, bool per_position, bool channels_last) -> Tensor",
)


def _num_parts(length: int, size: int) -> int:
    return -(-length // size)


def _lengths(length: int, size: int, device: torch.device) -> Tensor:
    """How long each part is: the last may be shorter."""
    starts = torch.arange(0, length, size, dtype=torch.float64, device=device)
    return (length - starts).clamp(max=size)


def _mean_magnitudes(w_OIP: Tensor, cin: int, cout: int, per_position: bool) -> Tensor:
    """Mean |w| of each block. The order of the sum is part of the result: filters, channels, positions."""
    num_out, num_in, num_positions = w_OIP.shape
    over_filters = w_OIP.new_zeros(_num_parts(num_out, cout), num_in, num_positions, dtype=torch.float64)
    for i in range(cout):
        filters = w_OIP[i::cout]
        over_filters[: len(filters)] += filters.abs()
    sums = over_filters.new_zeros(len(over_filters), _num_parts(num_in, cin), num_positions)
    for j in range(cin):
        channels = over_filters[:, j::cin]
        sums[:, : channels.shape[1]] += channels
    counts = _lengths(num_out, cout, w_OIP.device)[:, None, None] * _lengths(num_in, cin, w_OIP.device)[:, None]
    if per_position:
        return sums / counts
    whole = torch.zeros_like(sums[..., :1])
    for position in sums.split(1, dim=2):
        whole += position
    return whole / (counts * num_positions)


def _reference(
    weight: Tensor, num_removed: int, cin: int, cout: int, per_position: bool, channels_last: bool
) -> Tensor:
    if weight.numel() == 0:
        return in_order(torch.ones_like(weight, dtype=torch.bool), channels_last)
    num_out, num_in = weight.shape[:2]
    cin, cout = min(cin, num_in), min(cout, num_out)
    scores = _mean_magnitudes(weight.reshape(num_out, num_in, -1), cin, cout, per_position)
    kept = torch.ones_like(scores, dtype=torch.bool)
    # Sorting puts NaN behind infinity, so it is kept.
    kept.view(-1)[torch.argsort(scores.flatten(), stable=True)[:num_removed]] = False
    mask = kept.repeat_interleave(cout, 0)[:num_out].repeat_interleave(cin, 1)[:, :num_in]
    num_positions = weight.shape[2:].numel()
    return in_order(mask.expand(-1, -1, num_positions).reshape(weight.shape), channels_last)


torch.library.impl("fxslim::block_mask", "default", _reference)


@torch.library.register_fake("fxslim::block_mask")
def _fake(weight, num_removed, cin, cout, per_position, channels_last):  # type: ignore[no-untyped-def]
    return torch.empty_like(in_order(weight, channels_last), dtype=torch.bool)


def _check(weight: Tensor, ratio: float, cin: int, cout: int, per_position: bool) -> None:
    check_input(weight, "weight")
    if not 2 <= weight.dim() <= 5:
        raise ConfigError(f"weight has shape {tuple(weight.shape)}: blocks need (out, in, *kernel), 2 to 5 dims")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise DtypeError(f"ratio must be a number, got {ratio!r}")
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio={ratio} must be in [0, 1): the fraction of blocks that is removed")
    for name, value in (("cin", cin), ("cout", cout)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{name} must be an int, got {value!r}")
        if not 1 <= value < 2**62:
            raise ConfigError(f"{name}={value} must be in [1, 2**62): a block is cout filters x cin channels")
    if not isinstance(per_position, bool):
        raise DtypeError(f"per_position must be True or False, got {per_position!r}")


def block_mask(weight: Tensor, ratio: float, cin: int = 32, cout: int = 64, per_position: bool = True) -> Tensor:
    """Bool mask of a weight (out, in, *kernel) without the blocks of the smallest mean magnitude.

    A block is ``cout`` consecutive filters x ``cin`` consecutive input channels at one kernel position, or over
    the whole kernel with ``per_position=False``; what is left at the ends are smaller blocks. Of all blocks
    ``round(ratio * blocks)`` go, but never the last one. Equal blocks go as channels do in pruning, the lower
    index (of filters, then channels, then positions) first. Sums are made in float64, over filters, then
    channels, then positions, so the mask is the same on every device. A block with NaN counts as larger than
    infinity, so it is kept and stays visible. The mask lies in the weight's memory format and carries no gradient.

    >>> block_mask(torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 1.0], [0.0, 1.0, 8.0]]), 0.5, cin=2, cout=2)
    tensor([[ True,  True, False],
            [ True,  True, False],
            [False, False,  True]])
    """
    _check(weight, ratio, cin, cout, per_position)
    num_blocks = _num_parts(weight.shape[0], cout) * _num_parts(weight.shape[1], cin)
    num_blocks *= weight.shape[2:].numel() if per_position else weight.numel() > 0
    num_removed = max(0, min(round(ratio * num_blocks), num_blocks - 1))
    channels_last = lies_channels_last(weight)
    return torch.ops.fxslim.block_mask(weight.detach(), num_removed, cin, cout, per_position, channels_last)
