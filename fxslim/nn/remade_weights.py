# SPDX-License-Identifier: Apache-2.0
"""Quantized weights that are not kept for the backward, but made again there: less memory for one more pass."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.errors import UnsupportedLayerError


@dataclass
class _Made:
    """The weights of one forward, by where they lie in memory, while it runs."""

    layer: Any
    by_memory: dict[int, tuple[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How to make a weight again: nothing that it is made from may have changed."""

    layer: Any
    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    versions: tuple[int, ...]


@contextlib.contextmanager
def weights_made_again(layer: nn.Module) -> Iterator[None]:
    """While a layer's arithmetic runs: what autograd saves of its quantized weights is how to make them."""
    made = _Made(layer)
    layer.__dict__["_made"] = made
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _packed(made, tensor), _unpacked):
            yield
    finally:
        layer.__dict__.pop("_made", None)
        # The hooks live as long as the graph.
        made.by_memory.clear()


def note_made(layer: nn.Module, name: str, weight: Tensor) -> None:
    """A layer made a quantized weight."""
    made = layer.__dict__.get("_made")
    if made is not None and weight.is_contiguous():
        made.by_memory[weight.untyped_storage().data_ptr()] = name, weight


def _versions(layer: Any, name: str) -> tuple[int, ...]:
    quantizer = getattr(layer, name + "_quantizer")
    return tuple(tensor._version for tensor in (layer.stored(name), *quantizer.parameters()))


def _packed(made: _Made, tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        return tensor
    name, weight = made.by_memory.get(tensor.untyped_storage().data_ptr(), ("", None))
    if weight is None or tensor.numel() != weight.numel() or tensor.dtype != weight.dtype:
        return tensor
    return _Recipe(
        layer=made.layer,
        name=name,
        size=tuple(tensor.shape),
        stride=tensor.stride(),
        offset=int(tensor.storage_offset()),
        versions=_versions(made.layer, name),
    )


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    if _versions(packed.layer, packed.name) != packed.versions:
        raise UnsupportedLayerError(
            f"the weights of a {type(packed.layer).__name__} were changed between forward and backward, and with "
            "save_memory=True they are made again there: call backward before optimizer.step"
        )
    with torch.no_grad():
        weight = packed.layer.computed(packed.name)
    return weight.as_strided(packed.size, packed.stride, packed.offset)
