# SPDX-License-Identifier: Apache-2.0
"""Random masks of a network's weights: whole channels and single weights, in every form that masks may have."""

import random

import torch
from torch import Tensor, nn


def random_masks(model: nn.Module, seed: int) -> dict:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def zeros_and_ones(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) > 0.4).float()

    masks: dict = {}
    for name, layer in model.named_modules():
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if weight is None or chance.random() < 0.3:
            continue
        out = weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]
        along = [1] * weight.dim()
        kind = chance.choice(["output", "weight rows", "columns", "single", "bias", "both"])
        if kind == "output":
            masks[name] = zeros_and_ones(out)
        elif kind == "weight rows":
            masks[f"{name}.weight"] = zeros_and_ones(out)
        elif kind == "columns" and weight.dim() > 1:
            along[1] = weight.shape[1]
            masks[name] = zeros_and_ones(*along).expand(weight.shape)
        elif kind == "single":
            masks[name] = zeros_and_ones(*weight.shape)
        elif kind == "bias" and bias is not None:
            masks[f"{name}.bias"] = zeros_and_ones(*bias.shape)
        elif kind == "both":
            along[0] = weight.shape[0]
            masks[name] = {"weight": zeros_and_ones(*along).expand(weight.shape), "bias": None}
    return masks
