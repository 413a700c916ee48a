# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model can have a mask, and why others can't."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxslim import nn as counterparts
from fxslim.graph.computed_layers import find_computed_layers

_OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear
COUNTERPARTS: dict[type[nn.Module], type[counterparts.MaskedWeights]] = {
    nn.Linear: counterparts.MaskedLinear,
    nn.Conv1d: counterparts.MaskedConv1d,
    nn.Conv2d: counterparts.MaskedConv2d,
    nn.Conv3d: counterparts.MaskedConv3d,
    nn.ConvTranspose1d: counterparts.MaskedConvTranspose1d,
    nn.ConvTranspose2d: counterparts.MaskedConvTranspose2d,
    nn.ConvTranspose3d: counterparts.MaskedConvTranspose3d,
    nn.MultiheadAttention: counterparts.MaskedMultiheadAttention,
    _OUT_PROJ: counterparts.MaskedLinear,
}
# Where others read the weight.
HANDED_OVER: dict[type[nn.Module], type[counterparts.HandedOver]] = {
    nn.Linear: counterparts.HandedOverLinear,
    nn.Conv1d: counterparts.HandedOverConv1d,
    nn.Conv2d: counterparts.HandedOverConv2d,
    nn.Conv3d: counterparts.HandedOverConv3d,
    nn.ConvTranspose1d: counterparts.HandedOverConvTranspose1d,
    nn.ConvTranspose2d: counterparts.HandedOverConvTranspose2d,
    nn.ConvTranspose3d: counterparts.HandedOverConvTranspose3d,
    _OUT_PROJ: counterparts.HandedOverLinear,
}
_KINDS = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_UNMASKABLE = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
# By name, so that nothing is imported that the user did not import: transformers' linear layer of GPT-2.
_MATRIX_LAYERS = {"Conv1D"}


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskableWeight:
    """A weight of a layer, by the layer's name and its own; ``obstacle`` tells why it can't have a mask."""

    layer: str
    module: nn.Module
    attribute: str
    obstacle: str = ""

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.attribute}".lstrip(".")

    @property
    def weight(self) -> Tensor:
        # The attribute of a masked layer may show another tensor.
        parameter = self.module._parameters.get(self.attribute)
        return getattr(self.module, self.attribute) if parameter is None else parameter


def find_weights(model: nn.Module, users: Mapping[str, str]) -> list[MaskableWeight]:
    """All weights of linear layers, convolutions and attention, in the order of the model; each module once.

    ``users``: as ``find_users`` tells.
    """
    computed, found = find_computed_layers(model), []
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS):
            continue
        attributes = [a for a in _PROJECTIONS if getattr(module, a, None) is not None] or ["weight"]
        for attribute in attributes:
            user = users.get(f"{name}.{attribute}".lstrip("."))
            obstacle = computed.get(name) or _obstacle(module, user)
            found.append(MaskableWeight(layer=name, module=module, attribute=attribute, obstacle=obstacle))
    return found


def find_unmaskable(model: nn.Module) -> dict[str, str]:
    """Layers that multiply with matrices of their own and can have no mask, and their kinds.

    >>> find_unmaskable(nn.Sequential(nn.GRU(2, 2), nn.Linear(2, 2)))
    {'0': 'GRU'}
    """
    return {
        name or "the model": type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _UNMASKABLE) or _MATRIX_LAYERS & {base.__name__ for base in type(module).__mro__}
        if not isinstance(module, _KINDS) and any(p.dim() > 1 for p in module.parameters(recurse=False))
    }


def _obstacle(module: nn.Module, user: str | None) -> str:
    if isinstance(module, counterparts.QuantizedLayer):
        return "it is quantized already: make the float model sparse, and quantize it then"
    if isinstance(module, counterparts.MaskedWeights):
        return "it has a mask already: start from the model without it"
    if type(module) not in COUNTERPARTS:
        kind = next(k.__name__ for k in type(module).__mro__[1:] if k.__module__.startswith("torch.nn"))
        return f"{type(module).__name__} is a subclass of {kind}, and may compute something else"
    if user is not None and type(module) not in HANDED_OVER:
        return f"{user or 'the model'} hands its weight to a function, past the layer's own forward"
    return ""


def shared_weights(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by id."""
    return Counter(id(p) for m in dict.fromkeys(model.modules()) for p in m.parameters(recurse=False))


def group_count(module: Any) -> int:
    """The groups of a convolution; 1 for all else."""
    return int(getattr(module, "groups", 1))
