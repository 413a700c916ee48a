# SPDX-License-Identifier: Apache-2.0
"""Masked layers whose weight others read: what they read is the masked weight."""

import functools
from typing import Any

from torch import Tensor, nn

from fxslim.errors import UnsupportedLayerError
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.masked_convolutions import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
)
from fxslim.nn.masked_linear import MaskedLinear
from fxslim.nn.masked_weights import MaskedWeights, refresh_if_due


def _shown(layer: "HandedOver") -> Tensor:
    if "weight" not in layer._parameters:
        raise AttributeError(f"{type(layer).__name__} has no weight yet")
    return layer.computed()


class HandedOver(MaskedWeights):
    """Mixed into a masked layer: its attribute ``weight`` shows what the layer computes with.

    The parameter stays the same object under the same name, for state dicts, optimizers and ``named_parameters``.

    >>> layer = HandedOverLinear(4, 1, pattern="2:4")
    >>> int((layer.weight != 0).sum()), dict(layer.named_parameters())["weight"].is_leaf
    (2, True)
    """

    weight: Any = property(_shown)

    def count_in(self, user: nn.Module) -> None:
        """Count the forwards of a module that reads the weight, where the layer's own forward is never called."""
        hooks = self._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refresh_if_due]:
            del hooks[key]
        user.register_forward_pre_hook(functools.partial(_refresh_if_due, self))

    def before_batch(self) -> None:
        """As all masked layers; here too a weight that is computed by now, and shown without its mask, is refused."""
        if "weight" not in self._parameters:
            raise UnsupportedLayerError(
                f"weight of this {self.float_class.__name__} is no parameter any more (weight_norm, parametrizations), "
                "and those who read it would get it without its mask: bake(model) before such changes"
            )
        super().before_batch()

    def reset_parameters(self) -> None:
        """New random values for the parameter, not for the masked weight that ``weight`` shows."""
        plain: Any = copied_as(self, self.float_class)
        plain.reset_parameters()


def _refresh_if_due(layer: nn.Module, user: nn.Module, args: Any) -> None:
    """A forward pre-hook of the user. A layer that has no mask any more is left alone."""
    if isinstance(layer, HandedOver):
        layer.before_batch()


def stop_counting(user: nn.Module) -> None:
    """Take the hooks of ``count_in`` away that are of layers without a mask by now."""
    hooks = user._forward_pre_hooks
    ours = {k: h.args[0] for k, h in hooks.items() if isinstance(h, functools.partial) and h.func is _refresh_if_due}
    for key, layer in ours.items():
        if not isinstance(layer, HandedOver):
            del hooks[key]


class HandedOverLinear(HandedOver, MaskedLinear):
    """``MaskedLinear`` that others read."""


class HandedOverConv1d(HandedOver, MaskedConv1d):
    """``MaskedConv1d`` that others read."""


class HandedOverConv2d(HandedOver, MaskedConv2d):
    """``MaskedConv2d`` that others read."""


class HandedOverConv3d(HandedOver, MaskedConv3d):
    """``MaskedConv3d`` that others read."""


class HandedOverConvTranspose1d(HandedOver, MaskedConvTranspose1d):
    """``MaskedConvTranspose1d`` that others read."""


class HandedOverConvTranspose2d(HandedOver, MaskedConvTranspose2d):
    """``MaskedConvTranspose2d`` that others read."""


class HandedOverConvTranspose3d(HandedOver, MaskedConvTranspose3d):
    """``MaskedConvTranspose3d`` that others read."""
