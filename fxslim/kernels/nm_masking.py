# SPDX-License-Identifier: Apache-2.0
"""nm_mask: N of every M neighbours kept, the largest magnitudes."""

import torch
from torch import Tensor

from fxslim.errors import ConfigError, DtypeError
from fxslim.kernels.arguments import check_axis, check_input, in_order, lies_channels_last

torch.library.define("fxslim::nm_mask", "(Tensor weight, int n, int m, int axis, bool channels_last) -> Tensor")

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Above this group size comparing all pairs costs more than sorting.
_MAX_PAIRWISE = 32
# The CUDA kernel reads a whole group for each element: larger groups are sorted by the reference.
_MAX_CUDA_GROUP = 1024
# Groups compared at once: few enough for the cache.
_CHUNK = 1 << 17


def _magnitude_keys(weight: Tensor) -> Tensor:
    """Integers that order like magnitudes, NaN above infinity: the bits without the sign."""
    dtype = _BITS[weight.element_size()]
    return weight.contiguous().view(dtype) & torch.iinfo(dtype).max


def _keep_by_rank(groups: Tensor, n: int, kept: Tensor) -> None:
    """Keep where fewer than n members of the row are larger, or equal and earlier."""
    m = groups.shape[1]
    members = [groups[:, i].clone() for i in range(m)]
    ranks = [torch.full_like(members[0], m - 1 - i, dtype=torch.uint8) for i in range(m)]
    for i in range(m):
        for j in range(i + 1, m):
            first = torch.ge(members[i], members[j]).view(torch.uint8)
            ranks[j].add_(first)
            ranks[i].sub_(first)
    for i in range(m):
        kept[:, i] = ranks[i] < n


def _keep_by_sort(groups: Tensor, n: int, kept: Tensor) -> None:
    best = torch.argsort(groups, dim=1, descending=True, stable=True)[:, :n]
    kept.zero_().scatter_(1, best, True)


def _reference(weight: Tensor, n: int, m: int, axis: int, channels_last: bool) -> Tensor:
    length = weight.shape[axis]
    m = min(m, max(length, 1))
    n = min(n, m)
    keys = _magnitude_keys(weight.movedim(axis, -1))
    padded = torch.nn.functional.pad(keys, (0, -length % m), value=-1) if length % m else keys
    groups = padded.reshape(-1, m)
    kept = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
    keep = _keep_by_rank if m <= _MAX_PAIRWISE else _keep_by_sort
    for start in range(0, groups.shape[0], _CHUNK):
        keep(groups[start : start + _CHUNK], n, kept[start : start + _CHUNK])
    mask = kept.reshape(padded.shape)[..., :length].movedim(-1, axis)
    return in_order(mask, channels_last)


torch.library.impl("fxslim::nm_mask", "default", _reference)


@torch.library.register_fake("fxslim::nm_mask")
def _fake(weight, n, m, axis, channels_last):  # type: ignore[no-untyped-def]
    return torch.empty_like(in_order(weight, channels_last), dtype=torch.bool)


def nm_mask(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Bool mask that keeps the n largest magnitudes of every m consecutive elements along ``axis``.

    Exactly n are kept in each full group, ties by the lower index; a shorter last group keeps at most n.
    NaN counts as larger than infinity, so it is kept and stays visible. The mask lies in the weight's
    memory format and carries no gradient.

    >>> nm_mask(torch.tensor([[1.0, -3.0, 2.0, 2.0, 5.0]]), 2, 4)
    tensor([[False,  True,  True, False,  True]])
    """
    check_input(weight, "weight")
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= n <= m < 2**62:
        raise ConfigError(f"n={n}, m={m}: n kept of m needs 1 <= n <= m")
    if weight.dim() == 0:
        raise ConfigError("weight has no dimensions: there is no axis to group along")
    if axis is None:
        raise DtypeError("axis must be an int, got None")
    axis = check_axis(axis, weight) or 0
    if weight.is_cuda and min(m, weight.shape[axis]) > _MAX_CUDA_GROUP:
        return _reference(weight.detach(), n, m, axis, lies_channels_last(weight))
    return torch.ops.fxslim.nm_mask(weight.detach(), n, m, axis, lies_channels_last(weight))
