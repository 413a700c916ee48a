# SPDX-License-Identifier: Apache-2.0
"""What deployed layers share: a stored weight, a bias, and grids that stay, between which the layer computes.

They are made from a counterpart by its ``to_deploy()``. They compute the same in train and eval mode and give no
gradients.
"""

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from fxslim.errors import ConfigError, DtypeError, UnsupportedLayerError
from fxslim.nn.bias_grids import NEIGHBOURS, deployed_bias
from fxslim.nn.masked_weights import refresh_if_due
from fxslim.nn.norm_folding import count_batches, folded_norm
from fxslim.nn.quantizers import ActivationQuantizer, Phased
from fxslim.nn.quantizers.fixed_quantizers import FixedQuantizer
from fxslim.nn.small_weights import SmallWeight
from fxslim.patterns.weight_layout import layout_of

# Attributes of counterparts that nothing needs any more.
_OF_COUNTERPARTS = frozenset(("quant_config", "mask_settings", "float_class", "_folded", NEIGHBOURS))


class DeployedLayer(nn.Module):
    """Computes in floating point with a weight that is made from small numbers in each forward.

    ``norm``: a batch norm behind the layer that becomes part of it. ``given``: the quantizer elsewhere that the input
    comes from; its grid is kept, too.
    """

    # How many dims inputs have; None, any number.
    input_dims: int | None = None
    # Attributes that the arithmetic needs.
    settings: ClassVar[tuple[str, ...]] = ()
    bias: Tensor | None
    input_quantizer: FixedQuantizer | None
    output_quantizer: FixedQuantizer | None

    def __init__(
        self,
        layer: Any,
        norm: nn.Module | None = None,
        given: ActivationQuantizer | None = None,
        weight: SmallWeight | None = None,
    ) -> None:
        super().__init__()
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        self.input_dims = layer.input_dims
        self.weight = SmallWeight.of(layer, "weight", layout_of(layer)) if weight is None else weight
        self.register_buffer("bias", deployed_bias(layer, self.weight.scale_of_outputs, norm, given))
        if norm is not None:
            self.weight.multiply_outputs(folded_norm(norm)[0])
        source = layer.input_quantizer if given is None else given
        self.input_is_given = given is not None
        self.input_grid = None if source is None or source.config.format != "int" else source.config.grid
        self.input_quantizer = None if source is None else held(source)
        self.output_quantizer = None if layer.output_quantizer is None else held(layer.output_quantizer)
        if layer.is_fused_by_torch:
            keep_from_fusing(self)

    @property
    def kernel(self) -> str:
        """How it computes here: "float", or in integers."""
        return "float"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's arithmetic in floating point."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The layer's, between its grids."""
        self.check_input(input)
        output = self.computed(input)
        return output if self.output_quantizer is None else self.output_quantizer(output)

    def computed(self, x: Tensor, quantizer: nn.Module | None = None) -> Tensor:
        """Before the output's grid; with another quantizer of the same kind in place of the input's."""
        chosen = quantizer or self.input_quantizer
        if chosen is not None and not self.input_is_given:
            x = chosen(x)
        return self.product(x, self.weight(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def check_input(self, x: Tensor) -> None:
        """Raise for what the layer does not take."""
        if x.is_nested:
            raise UnsupportedLayerError(f"{type(self).__name__} takes no nested tensors: pad them")
        if not x.is_floating_point():
            raise DtypeError(f"{type(self).__name__} takes floating-point inputs, got {x.dtype}")
        if self.input_dims is not None and x.dim() != self.input_dims:
            raise ConfigError(f"{type(self).__name__} takes inputs of {self.input_dims} dims, got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return self.kernel


def held(quantizer: ActivationQuantizer) -> FixedQuantizer:
    """The grid of a quantizer as it is now, which nothing changes any more."""
    config = quantizer.config
    return FixedQuantizer(*quantizer.grid(), config.grid, config.format)


def keep_from_fusing(layer: nn.Module) -> None:
    """Torch's fused encoder layers read plain weights, unless there is a hook."""
    layer.register_forward_pre_hook(_stay_unfused)


def _stay_unfused(layer: nn.Module, args: Any) -> None:
    """That it is there is what matters."""


def become(module: nn.Module, deployed: nn.Module) -> None:
    """Turn a module into another one in place; it keeps its hooks, and attributes that are the user's."""
    before = dict(vars(module))
    hooks = {name: copy.copy(value) for name, value in before.items() if "_hooks" in name}
    pre_hooks = hooks["_forward_pre_hooks"]
    for key in [key for key, hook in pre_hooks.items() if hook in (refresh_if_due, count_batches)]:
        del pre_hooks[key]
    module.__dict__.clear()
    taken = _OF_COUNTERPARTS.union(deployed._modules, deployed._buffers, deployed._parameters)
    module.__dict__.update({name: value for name, value in before.items() if name not in taken})
    module.__dict__.update(vars(deployed) | hooks)
    module.__class__ = type(deployed)
    for hook in deployed._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook)
    module.train(before["training"])


def size_bytes(module: nn.Module) -> int:
    """What parameters and buffers take, each once; without what quantizers that learn keep."""
    parts = [part for part in module.modules() if not isinstance(part, Phased)]
    states = {id(state): state for part in parts for state in (*part._parameters.values(), *part._buffers.values())}
    return sum(state.numel() * state.element_size() for state in states.values() if state is not None)
