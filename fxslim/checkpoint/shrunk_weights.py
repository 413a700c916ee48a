# SPDX-License-Identifier: Apache-2.0
"""Fills a smaller model of the same class from a bigger one's weights: fewer blocks, smaller inner sizes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.checkpoint.weight_files import read_weights
from fxslim.errors import CheckpointError, ConfigError, unknown_name
from fxslim.graph.channel_graph import trace
from fxslim.graph.recording import named_states
from fxslim.graph.slots import Slot
from fxslim.plan.applied_plans import plain_name

# Parts of names of weights that hold queries, keys and values one after the other.
COMBINED = ("qkv", "in_proj", "c_attn", "query_key_value")


@dataclass(frozen=True)
class BlockMap:
    r"""Which old block each new block is filled from: ``id_map`` is {new id: old id}.

    ``pattern`` is matched at the start of names; its first group is the number of the block.

    >>> BlockMap(r"encoder\.layer\.(\d+)\.", {0: 0, 1: 2, 2: 4}).old_name("encoder.layer.1.output.weight")
    'encoder.layer.2.output.weight'
    """

    pattern: str
    id_map: Mapping[int, int]

    def __post_init__(self) -> None:
        if re.compile(self.pattern).groups < 1:
            raise ConfigError(f"BlockMap: {self.pattern!r} has no group for the number of the block: add (\\d+)")
        for ids in self.id_map.items():
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ConfigError(f"BlockMap: id_map must map block numbers to block numbers, not {ids!r}")

    def block_of(self, name: str) -> int | None:
        """The number of the block that a name belongs to."""
        found = re.match(self.pattern, name)
        return int(found.group(1)) if found else None

    def old_name(self, name: str) -> str | None:
        """The name in the bigger model; None for a block that the map does not have."""
        found = re.match(self.pattern, name)
        if found is None:
            return name
        new = int(found.group(1))
        if new not in self.id_map:
            return None
        return f"{name[: found.start(1)]}{self.id_map[new]}{name[found.end(1) :]}"


@dataclass(frozen=True, kw_only=True)
class ShrinkReport:
    """What ``load_shrunk`` did: tensors filled, those cut on the way, those that found nothing, those left over."""

    filled: int
    sliced: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    dropped: int

    def __str__(self) -> str:
        lines = [f"{self.filled} tensors filled, {len(self.sliced)} of them sliced; {self.dropped} of blocks left out"]
        lines += [f"missing, kept as they were: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"unexpected, not used: {', '.join(self.unexpected)}"] if self.unexpected else []
        return "\n".join(lines)


def load_shrunk(
    small_model: nn.Module,
    weights: Mapping[str, Tensor] | str | Path,
    *maps: BlockMap,
    combined: Sequence[str] = COMBINED,
    importance: str = "leading",
    inputs: Any = None,
) -> ShrinkReport:
    """Fill ``small_model`` from the weights of a bigger model of its class.

    Blocks are left out or renumbered by ``maps``. Where a tensor is smaller, its leading entries are taken; of
    weights with a part of ``combined`` in their names the leading entries of each third. ``importance="l2"``
    takes the entries with the largest norms instead, the same ones in all layers that share them; for that the
    small model is traced on ``inputs``. After any error the model is as it was.
    """
    if importance not in ("leading", "l2"):
        raise ConfigError(unknown_name("importance", importance, ("leading", "l2")))
    if importance == "l2" and inputs is None:
        raise ConfigError("importance='l2' needs inputs=: example inputs of the small model, to find what is coupled")
    found = read_weights(weights) if isinstance(weights, str | Path) else weights
    old = {plain_name(name): value for name, value in found.items()}
    _check_maps(maps, old, small_model)
    states = small_model.state_dict(keep_vars=True)
    sources = {name: _source(plain_name(name), maps) for name in states}
    kept = _important(small_model, sources, old, inputs) if importance == "l2" else {}
    filled, sliced = {}, {}
    for name, state in states.items():
        source = sources[name]
        if source is None or source not in old or not isinstance(state, Tensor):
            continue
        value = old[source]
        thirds = any(part in name for part in combined)
        filled[name] = _cut(name, value, tuple(state.shape), thirds, kept)
        if value.shape != state.shape:
            sliced[name] = tuple(value.shape), tuple(state.shape)
    with torch.no_grad():
        for name, value in filled.items():
            states[name].copy_(value)
    used = {sources[name] for name in filled}
    left = [name for name in old if name not in used]
    dropped = [name for name in left if any(blocks.block_of(name) is not None for blocks in maps)]
    return ShrinkReport(
        filled=len(filled),
        sliced=sliced,
        missing=tuple(name for name in states if name not in filled),
        unexpected=tuple(sorted(set(left) - set(dropped))),
        dropped=len(dropped),
    )


def _source(name: str, maps: Sequence[BlockMap]) -> str | None:
    """The old name of a tensor: by the first map that knows its block."""
    for blocks in maps:
        if blocks.block_of(name) is not None:
            return blocks.old_name(name)
    return name


def _check_maps(maps: Sequence[BlockMap], old: Mapping[str, Tensor], model: nn.Module) -> None:
    """Every block that a map names must be there, on both sides."""
    names = [plain_name(name) for name in model.state_dict()]
    for blocks in maps:
        for side, known, wanted in (
            ("weights have", {blocks.block_of(name) for name in old}, set(blocks.id_map.values())),
            ("small model has", {blocks.block_of(name) for name in names}, set(blocks.id_map)),
        ):
            absent = sorted(wanted - known)
            if absent:
                there = sorted(i for i in known if i is not None)
                raise CheckpointError(f"BlockMap {blocks.pattern!r}: the {side} no block {absent}, only {there}")


def _cut(
    name: str, value: Tensor, shape: tuple[int, ...], thirds: bool, kept: Mapping[tuple[str, int], Tensor]
) -> Tensor:
    """The entries of a bigger tensor that a smaller one takes."""
    if value.dim() != len(shape) or any(new > was for new, was in zip(shape, value.shape, strict=False)):
        raise CheckpointError(
            f"{name}: the small model wants {shape}, the weights have {tuple(value.shape)}: sizes can only be cut"
        )
    outputs = 1 if value.dim() == 2 and value.shape[1] == 3 * value.shape[0] else 0
    for d, (new, was) in enumerate(zip(shape, tuple(value.shape), strict=True)):
        if new == was:
            continue
        if (name, d) in kept:
            value = value.index_select(d, kept[name, d].to(value.device))
        elif thirds and d == outputs and new % 3 == 0 and was % 3 == 0:
            parts = value.unflatten(d, (3, was // 3)).narrow(d + 1, 0, new // 3)
            value = parts.flatten(d, d + 1)
        else:
            value = value.narrow(d, 0, new)
    return value


def _important(
    model: nn.Module, sources: Mapping[str, str | None], old: Mapping[str, Tensor], inputs: Any
) -> dict[tuple[str, int], Tensor]:
    """For dims that hold the channels of one group: which of the bigger model's entries have the largest norms."""
    kept: dict[tuple[str, int], Tensor] = {}
    shapes = {name: tuple(state.shape) for name, state in named_states(model)}
    for group in trace(model, inputs).groups:
        whole = [slot for slot in group.slots if slot.blocks == 1 and len(slot.ids) == len(group)]
        weights = [(slot, old.get(sources.get(slot.name) or "")) for slot in whole]
        lengths = {value.shape[slot.dim] for slot, value in weights if value is not None}
        if len(whole) < len(group.slots) or len(lengths) != 1 or any(value is None for _, value in weights):
            continue
        length, new = lengths.pop(), len(group)
        if length <= new:
            continue
        scores = torch.zeros(length, dtype=torch.float64)
        for slot, value in weights:
            if value is not None and slot.role != "follower" and shapes[slot.name][slot.dim] == new:
                scores += _squares(slot, value)
        best = scores.argsort(descending=True, stable=True)[:new].sort().values
        kept.update({slot.key: best for slot in whole})
    return kept


def _squares(slot: Slot, value: Tensor) -> Tensor:
    """Sums of squares for each entry of a dim, as shares of their mean."""
    others = [d for d in range(value.dim()) if d != slot.dim]
    sums = value.double().cpu().square().sum(others)
    return sums / sums.mean().clamp(min=1e-300)
