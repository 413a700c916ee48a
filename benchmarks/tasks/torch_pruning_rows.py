# SPDX-License-Identifier: Apache-2.0
"""Torch-Pruning's criteria on the same networks, brought to the same macs. pip install torch-pruning==1.6.1"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.tasks.candidates import Candidate
from benchmarks.tasks.networks import Attention

Batches = list[tuple[Tensor, Tensor]]
# Of the criterion that sums squared gradients of single images; each costs a backward pass.
SINGLE_IMAGES = 256
# As close to the macs as the bisection tries to come, and as far off as is still compared.
CLOSE, FAR = 0.01, 0.03


def _magnitude(model: nn.Module, batches: Batches) -> list[Tensor | None]:
    return [None for _ in model.parameters()]


def _mean_gradients(model: nn.Module, batches: Batches) -> list[Tensor | None]:
    for images, labels in batches:
        (nn.functional.cross_entropy(model(images), labels) / len(batches)).backward()
    return [parameter.grad for parameter in model.parameters()]


def _single_squares(model: nn.Module, batches: Batches) -> list[Tensor | None]:
    """The mean of squared gradients of single images."""
    sums: list[Tensor] = [torch.zeros_like(parameter) for parameter in model.parameters()]
    images, labels = (torch.cat(parts)[:SINGLE_IMAGES] for parts in zip(*batches, strict=True))
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        for total, parameter in zip(sums, model.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad.square()
    return [total / len(images) for total in sums]


def _last_square(model: nn.Module, batches: Batches) -> list[Tensor | None]:
    """What accumulate_grad of 1.6.1 leaves: it looks parameters up by name but files them by tensor, so only the
    last image counts."""
    images, labels = (torch.cat(parts)[:SINGLE_IMAGES] for parts in zip(*batches, strict=True))
    return _single_squares(model, [(images[-1:], labels[-1:])])


# Importance class, its arguments, and the gradients that it reads.
RIVALS: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module, Batches], list[Tensor | None]]]] = {
    "tp:magnitude": ("MagnitudeImportance", {"p": 2}, _magnitude),
    "tp:taylor": ("TaylorImportance", {}, _mean_gradients),
    "tp:hessian": ("HessianImportance", {}, _single_squares),
    "tp:hessian-as-shipped": ("HessianImportance", {}, _last_square),
    "tp:bn": ("BNScaleImportance", {}, _magnitude),
}


def rival_candidates(
    name: str, model: nn.Module, example: Tensor, batches: Batches, macs: int, round_to: int | None = None
) -> list[Candidate]:
    """Networks of about these macs: ranked over all layers and in each layer; attention by entries and by heads."""
    kind, arguments, gradients = RIVALS[name]
    found = gradients(copy.deepcopy(model).eval(), batches)
    attention = any(isinstance(module, Attention) for module in model.modules())
    candidates = []
    for scope in ("global", "layer"):
        for heads in (False, True) if attention else (False,):
            prune = _Rival(
                model=model, example=example, kind=kind, arguments=arguments, gradients=found,
                everywhere=scope == "global", heads=heads, round_to=round_to,
            )  # fmt: skip
            pruned = prune.to(macs)
            if pruned is not None:
                candidates.append(Candidate(settings=scope + " heads" * heads, model=pruned[0], macs=pruned[1]))
    return candidates


@dataclass(frozen=True, kw_only=True)
class _Rival:
    model: nn.Module
    example: Tensor
    kind: str
    arguments: dict[str, Any]
    gradients: list[Tensor | None]
    everywhere: bool
    heads: bool
    round_to: int | None

    def to(self, macs: int) -> tuple[nn.Module, int] | None:
        """By bisection of pruning_ratio; else the least above these macs, if within 3 %."""
        low, high = 0.0, 1.0
        best: tuple[nn.Module, int] | None = None
        for _ in range(14):
            middle = (low + high) / 2
            pruned = self.at(middle)
            if pruned is None:
                high = middle
                continue
            kept = fxslim.trace(pruned, self.example).cost.macs
            if abs(kept - macs) <= CLOSE * macs:
                return pruned, kept
            if kept > macs:
                low, best = middle, (pruned, kept)
            else:
                high = middle
        return best if best is not None and best[1] <= (1 + FAR) * macs else None

    def at(self, ratio: float) -> nn.Module | None:
        """The network after one step; None where it takes all heads."""
        import torch_pruning

        model = copy.deepcopy(self.model).eval()
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        # Its defaults for these dicts are shared between pruners.
        pruner = torch_pruning.pruner.BasePruner(
            model, self.example, getattr(torch_pruning.importance, self.kind)(**self.arguments),
            global_pruning=self.everywhere, pruning_ratio=ratio, max_pruning_ratio=0.9,
            ignored_layers=[model.get_submodule("head")], in_channel_groups={}, out_channel_groups={},
            num_heads={layer: a.num_heads for a in attentions for layer in (a.query, a.key, a.value)},
            prune_num_heads=self.heads, prune_head_dims=not self.heads,
            head_pruning_ratio=min(ratio, 0.75) if self.heads else 0.0, round_to=self.round_to,
        )  # fmt: skip
        pruner.step()
        if not all(pruner.num_heads[attention.query] for attention in attentions):
            return None
        for attention in attentions:
            attention.num_heads = pruner.num_heads[attention.query]
            attention.head_dim = attention.query.out_features // attention.num_heads
        model.zero_grad()
        return model
