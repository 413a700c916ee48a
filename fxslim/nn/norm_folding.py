# SPDX-License-Identifier: Apache-2.0
"""Batch norms that deployment folds into the convolution before: the weight is quantized as it will be folded.

Both layers stay as they are. The weight is scaled by what the running statistics say, quantized, and scaled back, so
that the norm goes on with the statistics of the batch, and taking the quantizer away leaves the float model exactly.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fxslim.nn.quantizers.phases import Phased, is_recomputed

FREEZER = "freezer"


def folded_scale(norm: nn.Module) -> Tensor:
    """What folding multiplies each output channel with; 1 where that is 0, or not known yet."""
    layer: Any = norm
    scale = torch.rsqrt(layer.running_var + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight.detach()
    return torch.where(scale.isfinite() & (scale != 0), scale, torch.ones_like(scale))


@torch.no_grad()
def folded_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel by which a norm does its work with running statistics, in double precision."""
    layer: Any = norm
    factor = torch.rsqrt(in_double(layer.running_var) + layer.eps)
    if layer.weight is not None:
        factor = factor * layer.weight
    shift = -layer.running_mean * factor
    return factor.detach(), (shift if layer.bias is None else shift + layer.bias).detach()


def in_double(values: Tensor) -> Tensor:
    """In float64, where the device knows it."""
    return values.float() if values.device.type == "mps" else values.double()


def has_statistics(norm: nn.Module) -> bool:
    """Whether a module is a batch norm that can become part of the layer before it."""
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None


class NormFreezer(Phased):
    """Counts the training batches of a norm; after so many it normalises by its running statistics, in training too."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batches = batches

    def count(self, norm: nn.Module) -> None:
        """A forward of the norm in training."""
        seen = self.batches_seen
        if seen >= self.batches:
            norm.training = False
        elif not torch.compiler.is_compiling() and not is_recomputed():
            self.batches_seen = seen + 1

    def extra_repr(self) -> str:
        return f"after {self.batches} batches"


def count_batches(norm: nn.Module, args: Any) -> None:
    """A forward pre-hook of norms that freeze."""
    freezer = norm._modules.get(FREEZER)
    if norm.training and isinstance(freezer, NormFreezer):
        freezer.count(norm)


def freeze_later(norm: nn.Module, batches: int) -> None:
    """Let a norm freeze after so many training batches."""
    norm.add_module(FREEZER, NormFreezer(batches).to(next(iter(norm.buffers())).device))
    norm.register_forward_pre_hook(count_batches)


def without_norm(norm: nn.Module) -> nn.Module:
    """What stands where a norm became part of the layer before: nothing, but a quantizer of its output."""
    made = nn.Identity()
    quantizer = norm._modules.get("output_quantizer")
    if quantizer is not None:
        made.add_module("output_quantizer", quantizer)
    return made
