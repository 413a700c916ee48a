# SPDX-License-Identifier: Apache-2.0
"""Which entries of the full-size parameters and buffers cuts remove, and what weight norm makes of the rest."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fxslim.graph.surgery.cutting import Cut
from fxslim.graph.weight_norms import WeightNorm, norms_of


def removed_entries(cut: Cut, shape: tuple[int, ...]) -> Tensor:
    """True where a tensor of this shape loses entries; of its rank, so that it broadcasts to it.

    >>> removed_entries(Cut(name="conv.weight", dim=0, keep=(0, 2)), (3, 1)).flatten()
    tensor([False,  True, False])
    """
    gone = torch.ones(cut.blocks * shape[cut.dim], dtype=torch.bool)
    gone[list(cut.keep)] = False
    if cut.blocks > 1:
        # Each block of output channels reads inputs of its own.
        gone = gone.view(cut.blocks, shape[1]).repeat_interleave(shape[0] // cut.blocks, 0)
        return gone.view(shape[0], shape[1], *[1] * (len(shape) - 2))
    return gone.view([-1 if d == cut.dim else 1 for d in range(len(shape))])


def silent_entries(
    cuts: Iterable[Cut], states: Mapping[str, Tensor], norms: Iterable[WeightNorm]
) -> dict[str, list[Tensor]]:
    """By name, what must be 0 so that the channels are silent in the full-size model.

    A direction without entries has no norm: what goes along the norm's own dim is silent by its gain.
    """
    cuts, found = list(cuts), dict[str, list[Tensor]]()
    cut_places = {(cut.name, cut.dim) for cut in cuts}
    by_gain = {(norm.direction, norm.dim) for norm in norms if (norm.gain, norm.dim) in cut_places}
    for cut in cuts:
        # A norm without parameters has no values.
        if cut.name in states and (cut.name, cut.dim) not in by_gain:
            found.setdefault(cut.name, []).append(removed_entries(cut, tuple(states[cut.name].shape)))
    return found


def kept_norms(
    norms: Iterable[WeightNorm],
    states: Mapping[str, Tensor],
    silent: Mapping[str, Iterable[Tensor]],
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Full-size values with which the rest of each weight under weight norm stays as it is without silent entries.

    Its norms get smaller, and its gains with them. A rest that is 0, or too small for a norm in its dtype, gets norm 1.
    ``values`` are taken in the place of ``states``; the results are theirs and new ones, in float64.
    """
    found = dict(values)
    for norm in norms:
        gain, direction = (values.get(name, states[name].detach()) for name in (norm.gain, norm.direction))
        if norm.direction not in silent or direction.is_meta:
            continue
        rest = direction
        for gone in silent[norm.direction]:
            rest = rest.masked_fill(gone.to(rest.device), 0)
        before, after = norms_of(direction, norm.dim), norms_of(rest, norm.dim)
        changed = after < before
        if changed.any():
            found[norm.gain] = gain.double() * torch.where(changed, after / before, 1.0)
            small = changed & (after < torch.finfo(states[norm.direction].dtype).tiny ** 0.5)
            if small.any():
                rest = rest.double()
                found[norm.direction] = torch.where(small, torch.where(after > 0, rest / after, 1.0), rest)
    return found
