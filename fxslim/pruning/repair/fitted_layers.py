# SPDX-License-Identifier: Apache-2.0
"""Which layers least squares can refit, by what, and why others are left."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxslim.graph.recording import named_states
from fxslim.graph.slots import owner
from fxslim.graph.surgery.cutting import Cut
from fxslim.pruning.repair.sampled_rows import Fitted

_DOUBLE_BYTES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerFit:
    """A layer that loses inputs, and the columns by which what it loses is made up for.

    A weight is ``groups`` x outputs x ``columns`` x ``taps``: with one tap each entry is fitted for itself, else the
    lost channels are predicted from the kept ones, alike for all taps.
    """

    name: str
    layer: Fitted
    cut: Cut
    columns: int
    taps: int

    def by_channel(self) -> "LayerFit":
        """The coarser fit of the same layer; itself where there is none."""
        shape = self.layer.weight.shape
        taps = taps_alike(self.cut, shape)
        return replace(self, taps=taps, columns=math.prod(shape[1:]) // taps)

    @property
    def groups(self) -> int:
        return self.cut.blocks

    @property
    def kept(self) -> Tensor:
        """Columns that stay, groups x kept, in the order that they have in the pruned layer."""
        return kept_columns(self.cut, self.layer.weight.shape, self.taps)

    def size_bytes(self, inputs: str) -> int:
        """What the sums of products take."""
        return sums_bytes(self.kept, self.columns, inputs)


def kept_columns(cut: Cut, shape: Sequence[int], taps: int) -> Tensor:
    """The columns of a fit with so many taps that a cut keeps.

    >>> kept_columns(Cut(name="fc.weight", dim=1, keep=(0, 1, 4, 5)), (3, 6), 1)
    tensor([[0, 1, 4, 5]])
    >>> kept_columns(Cut(name="fc.weight", dim=1, keep=(0, 1, 4, 5)), (3, 6), 2)
    tensor([[0, 2]])
    """
    by_block = torch.tensor(cut.keep, dtype=torch.int64).view(cut.blocks, -1)
    by_block = by_block - shape[1] * torch.arange(cut.blocks).unsqueeze(1)
    if len(shape) == 2:
        return by_block[:, ::taps] // taps
    kernel = math.prod(shape[2:])
    if taps > 1 or kernel == 1:
        return by_block
    return (by_block.unsqueeze(2) * kernel + torch.arange(kernel)).flatten(1)


def sums_bytes(kept: Tensor, columns: int, inputs: str) -> int:
    """The size of sums of products in float64, with a column of ones."""
    groups, k = kept.shape
    entries = (columns + 1) ** 2 if inputs == "original" else (k + 1) * (k + columns + 2)
    return groups * entries * _DOUBLE_BYTES


def find_fits(
    model: nn.Module, cuts: Iterable[Cut], *, inputs: str, limit_bytes: int
) -> tuple[list[LayerFit], dict[str, str]]:
    """The layers to refit, and for each other one that loses inputs why it is left; fits by channel are told too."""
    modules, states = dict(model.named_modules()), dict(named_states(model))
    uses = Counter(id(p) for m in dict.fromkeys(model.modules()) for p in m.parameters(recurse=False))
    fits: list[LayerFit] = []
    told: dict[str, str] = {}
    for cut in cuts:
        if cut.role != "consumer":
            continue
        name, attribute = owner(cut.name), cut.name.rpartition(".")[2]
        layer = modules.get(name)
        reason = _reason(layer, attribute, cut, uses)
        if reason is None and layer is not None and layer.bias is not None:
            own = states.get(f"{name}.bias".lstrip("."))
            reason = None if own is layer.bias else "its bias is computed, or another layer's"
        if reason is None:
            assert isinstance(layer, Fitted)
            reason = _add_fit(fits, LayerFit(name=name, layer=layer, cut=cut, columns=0, taps=1), inputs, limit_bytes)
        if reason is not None:
            told[name if attribute == "weight" or isinstance(layer, Fitted) else cut.name] = reason
    return fits, told


def _reason(layer: nn.Module | None, attribute: str, cut: Cut, uses: Counter[int]) -> str | None:
    """Why a layer can't be refitted."""
    if not isinstance(layer, Fitted):
        return f"least squares knows Conv1d, Conv2d, Conv3d and Linear, not {type(layer).__name__}"
    if attribute != "weight":
        return f"its weight is computed from {attribute}"
    if any(uses[id(p)] > 1 for p in (layer.weight, layer.bias) if p is not None):
        return "its weight or bias is shared with another layer"
    if not layer.weight.is_floating_point():
        return f"its weight is {layer.weight.dtype}"
    if cut.dim != 1 or cut.blocks != getattr(layer, "groups", 1):
        return "its inputs are not cut by group"
    return None


def _add_fit(fits: list[LayerFit], fit: LayerFit, inputs: str, limit_bytes: int) -> str | None:
    """Add the finest fit that the limit allows; a reason where it is coarser, or there is none."""
    shape = fit.layer.weight.shape
    needed = []
    for taps in dict.fromkeys((1, taps_alike(fit.cut, shape))):
        columns = math.prod(shape[1:]) // taps
        needed.append(sums_bytes(kept_columns(fit.cut, shape, taps), columns, inputs))
        if needed[-1] <= limit_bytes:
            fits.append(LayerFit(name=fit.name, layer=fit.layer, cut=fit.cut, columns=columns, taps=taps))
            return None if taps == 1 else f"fitted by channel: by entry takes {needed[0]:,} bytes of {limit_bytes:,}"
    return f"its sums take {min(needed):,} bytes and limit_bytes is {limit_bytes:,}"


def taps_alike(cut: Cut, shape: Sequence[int]) -> int:
    """How many neighbours in a weight always stay or go together: a kernel, or the pixels of a flattened channel."""
    if len(shape) > 2:
        return math.prod(shape[2:])
    stays = torch.zeros(shape[1] + 1, dtype=torch.int64)
    stays[list(cut.keep)] = 1
    edges = (stays.diff().nonzero().flatten() + 1).tolist()
    taps = math.gcd(shape[1], *edges)
    # A channel's pixels must also lie together, in their order, in the pruned layer.
    heads = torch.tensor(cut.keep[::taps])
    in_order = (heads.unsqueeze(1) + torch.arange(taps)).flatten().tolist() == list(cut.keep)
    return taps if in_order and bool((heads % taps == 0).all()) else 1
