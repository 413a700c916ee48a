# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model can be quantized, and why others can't."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxslim import nn as counterparts
from fxslim.errors import FxslimError
from fxslim.graph.computed_layers import find_computed_layers
from fxslim.nn import QuantizedLayer

OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear
_OF_KIND: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: counterparts.LinearQAT,
    OUT_PROJ: counterparts.LinearQAT,
    nn.Conv1d: counterparts.Conv1dQAT,
    nn.Conv2d: counterparts.Conv2dQAT,
    nn.Conv3d: counterparts.Conv3dQAT,
    nn.ConvTranspose1d: counterparts.ConvTranspose1dQAT,
    nn.ConvTranspose2d: counterparts.ConvTranspose2dQAT,
    nn.ConvTranspose3d: counterparts.ConvTranspose3dQAT,
    nn.Embedding: counterparts.EmbeddingQAT,
    nn.MultiheadAttention: counterparts.MultiheadAttentionQAT,
}
# Masked layers keep their masks.
COUNTERPARTS: dict[type[nn.Module], type[QuantizedLayer]] = {
    **_OF_KIND,
    **{c.masked_class: c for c in _OF_KIND.values() if c.masked_class is not None},
}
_KINDS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizableLayer:
    """A layer by name; ``obstacle`` tells why it stays in float, ``user`` which module reads its weight."""

    name: str
    module: Any
    obstacle: str = ""
    user: str | None = None

    @property
    def counterpart(self) -> type[QuantizedLayer]:
        """The class that it becomes."""
        return counterparts.HandedOverLinearQAT if self.user is not None else COUNTERPARTS[type(self.module)]


def find_layers(model: nn.Module, users: Mapping[str, str]) -> list[QuantizableLayer]:
    """All linear layers, convolutions, embeddings and attention, each module once; ``users`` as ``find_users`` tells.

    The projections inside of an attention layer belong to it.
    """
    computed, inside = find_computed_layers(model), set[int]()
    shared = _shared_weights(model)
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, _KINDS) or id(module) in inside:
            continue
        if type(module) in (nn.MultiheadAttention, counterparts.MaskedMultiheadAttention):
            inside |= {id(child) for child in module.children()}
        user = users.get(f"{name}.weight".lstrip("."))
        obstacle = computed.get(name) or shared.get(name) or _obstacle(module, user)
        found.append(QuantizableLayer(name=name, module=module, obstacle=obstacle, user=None if obstacle else user))
    return found


def _obstacle(module: nn.Module, user: str | None) -> str:
    kind = type(module)
    if isinstance(module, QuantizedLayer):
        return "it is quantized already: start from the float model"
    if kind not in COUNTERPARTS:
        base = next(k.__name__ for k in kind.__mro__[1:] if k.__module__.startswith("torch.nn."))
        return f"{kind.__name__} is a subclass of {base}, and may compute something else"
    if user is not None and kind not in (nn.Linear, OUT_PROJ):
        return f"{user or 'the model'} reads its weight past the layer's own forward"
    try:
        checked: Any = object.__new__(COUNTERPARTS[kind])
        checked.__dict__.update(vars(module))
        checked.check_layer()
    except FxslimError as error:
        return str(error)
    return ""


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Layers that hold a parameter which another layer holds too."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                holders.setdefault(id(parameter), []).append(name)
    return {
        name: f"its weight is shared with {', '.join(other for other in names if other != name)}"
        for names in holders.values()
        if len(names) > 1
        for name in names
    }
