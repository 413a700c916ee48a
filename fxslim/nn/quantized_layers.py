# SPDX-License-Identifier: Apache-2.0
"""What all QAT counterparts share: quantizers of the weight, the input and the output around the layer's arithmetic.

The stored weight stays a float parameter; what the layer computes with is made anew in each forward. A mask, where the
layer has one, is put on first.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxslim.errors import CalibrationError, ConfigError, DtypeError, UnsupportedLayerError
from fxslim.nn.bias_grids import (
    Neighbours,
    bias_in_eval,
    forget_neighbours,
    has_integers,
    make_room_for_bias,
    remember_neighbours,
    tell_readers,
)
from fxslim.nn.layer_copies import copied_as
from fxslim.nn.masked_weights import MaskedWeights, refresh_if_due
from fxslim.nn.norm_folding import folded_scale
from fxslim.nn.quant_config import QuantConfig
from fxslim.nn.quant_dialects import as_quant_config
from fxslim.nn.quantizers import ActivationQuantizer, Phased, WeightQuantizer, activation_quantizer, weight_quantizer
from fxslim.nn.quantizers.onnx_lowering import is_lowering, telling
from fxslim.nn.quantizers.real_values import real_twin, without_modes
from fxslim.nn.quantizers.stored_weights import StoredWeight
from fxslim.nn.remade_weights import note_made, weights_made_again
from fxslim.patterns.weight_layout import layout_of

_SUFFIX = "_quantizer"


class QuantizedLayer(MaskedWeights):
    """Mixed into a layer: it computes with quantized weights and inputs, and gives a quantized output.

    ``weight_quantizer``, ``input_quantizer`` and ``output_quantizer`` are modules, or None where the config has none.
    """

    quant_config: QuantConfig
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    # Beside the plain class, those that from_float takes.
    masked_class: ClassVar[type[nn.Module] | None] = None
    # Inputs that have quantizers of their own.
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    # Whether torch has layers that read the weights of such a layer themselves.
    is_fused_by_torch: ClassVar[bool] = False
    # How many dims inputs have; None, any number.
    input_dims: ClassVar[int | None] = None

    def __init__(self, *args: Any, config: Any = None, **kwargs: Any) -> None:
        chosen = self.checked_config(config)
        super(MaskedWeights, self).__init__(*args, **kwargs)
        self.check_layer()
        self.start_quantizing(chosen)

    @classmethod
    def checked_config(cls, config: Any) -> QuantConfig:
        """A config in any dialect, fit for this kind of layer."""
        return as_quant_config(config, cls.__name__)

    @classmethod
    def from_float(cls, layer: nn.Module, config: Any = None) -> Self:  # type: ignore[override]
        """A quantized layer with the same Parameter objects, attributes, mask and hooks.

        ``config``: a ``QuantConfig``, a name such as "int8" or "w4a8", or a dict of AMCT's or NNI's.
        """
        if isinstance(layer, QuantizedLayer):
            raise UnsupportedLayerError(f"{cls.__name__}.from_float: this {type(layer).__name__} is quantized already")
        if type(layer) not in (cls.float_class, cls.masked_class):
            raise UnsupportedLayerError(
                f"{cls.__name__}.from_float takes a {cls.float_class.__name__}, got a {type(layer).__name__}"
                + (": a subclass may compute something else" if isinstance(layer, cls.float_class) else "")
            )
        chosen = cls.checked_config(config)
        quantized = copied_as(layer, cls)
        quantized.check_layer()
        quantized.start_quantizing(chosen)
        return quantized

    def check_layer(self) -> None:
        """Raise for what this kind of layer can't do quantized."""
        name = next((name for name in self.maskable if name not in self._parameters), None)
        if name is not None:
            raise UnsupportedLayerError(
                f"{name} of this {self.float_class.__name__} is no parameter: it is computed before each forward "
                "(weight_norm, spectral_norm, torch.nn.utils.prune): remove that first"
            )

    def start_quantizing(self, config: QuantConfig) -> None:
        """Add the quantizers; the layer's own parameters stay as they are."""
        self.quant_config = config
        for name in self.maskable:
            weight = self.stored(name)
            setattr(self, name + _SUFFIX, self._weight_quantizer(name, weight))
        for name in self.input_names:
            setattr(self, name + _SUFFIX, self._activation_quantizer(config.activation))
        self.output_quantizer = self._activation_quantizer(config.output)
        self.name_quantizers(type(self).__name__)
        for quantizer in self.quantizers().values():
            quantizer.train(self.training)
        if self.is_fused_by_torch and refresh_if_due not in self._forward_pre_hooks.values():
            # Torch's fused encoder layers read plain weights, unless there is a hook.
            self.register_forward_pre_hook(refresh_if_due)

    def _weight_quantizer(self, name: str, weight: Tensor) -> WeightQuantizer | None:
        config = self.quant_config
        if config.weight is None:
            return None
        try:
            return weight_quantizer(config.weight, layout_of(self), weight, config.start_step)
        except ConfigError as error:
            raise ConfigError(f"{name} of this {self.float_class.__name__}: {error}") from error

    def _activation_quantizer(self, config: Any) -> ActivationQuantizer | None:
        if config is None:
            return None
        return activation_quantizer(config, self.quant_config.start_step).to(self.stored(self.maskable[0]).device)

    def name_quantizers(self, name: str) -> None:
        """What errors call the quantizers."""
        for key, quantizer in self.quantizers().items():
            quantizer.layer_name = f"the {key.removesuffix(_SUFFIX).replace('_', ' ')} of {name}"  # type: ignore[assignment]

    def quantizers(self) -> dict[str, Phased]:
        """Those that the layer has, by attribute."""
        return {name: module for name, module in self._modules.items() if isinstance(module, Phased)}

    def computed(self, name: str = "weight", scales: list[Tensor] | None = None) -> Tensor:
        """``scales`` gets those of the result, where it is on a grid."""
        quantizer = self._modules.get(name + _SUFFIX)
        if isinstance(quantizer, StoredWeight):
            return quantizer()
        if quantizer is not None and is_lowering():
            with without_modes(), telling():
                kept = stored_weight(self, name)
                if kept is not None and self.rounds_biases:
                    make_room_for_bias(real_twin(self), name, kept)
            if kept is not None and scales is not None and kept.scale_of_outputs is not None:
                scales.append(kept.scale_of_outputs)
            return self.masked(name) if kept is None else kept()
        weight = self.masked(name)
        if quantizer is None:
            return weight
        folded = self.__dict__.get("_folded")
        given = () if folded is None else (folded_scale(folded[0]),)
        result = quantizer(weight, *given) if scales is None else quantizer(weight, *given, scales=scales)
        if result is not weight:
            note_made(self, name, result)
        return result

    def terms(self) -> tuple[Tensor, Tensor | None]:
        if not self.rounds_biases:
            return super().terms()
        scales: list[Tensor] = []
        weight = self.computed(scales=scales)
        bias: Any = self.bias
        scale = scales[0] if scales else None
        tell_readers(self, scale)
        return weight, bias_in_eval(self, bias, scale)

    @property
    def rounds_biases(self) -> bool:
        """Whether biases are those that integer kernels add; in training they are as they are."""
        return not self.training and has_integers(self.quant_config.weight)

    def fold(self, norm: nn.Module) -> None:
        """Quantize the weight as it will be when this batch norm is folded into it; the norm stays where it is."""
        # In a tuple, so that it is no submodule.
        self._folded = (norm,)

    def stand_between(self, neighbours: Neighbours) -> None:
        """Know what decides the steps of the sums, of which eval mode makes whole numbers, and who reads them."""
        remember_neighbours(self, neighbours)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer's, between the quantizers."""
        self.check_call(input)
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        if self.quant_config.save_memory and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with weights_made_again(self):
                output = super().forward(input, *args, **kwargs)
        else:
            output = super().forward(input, *args, **kwargs)
        return output if self.output_quantizer is None else self.output_quantizer(output)

    def check_call(self, input: Tensor) -> None:
        """Raise for inputs that the layer does not take, and inside of nn.DataParallel."""
        if getattr(self, "_is_replica", False):
            raise UnsupportedLayerError(
                f"{type(self).__name__} runs inside of nn.DataParallel, whose replicas forget what quantizers learn: "
                "use torch.nn.parallel.DistributedDataParallel"
            )
        if input.is_nested:
            raise UnsupportedLayerError(
                f"{type(self).__name__} takes no nested tensors: pad them; in an nn.TransformerEncoder set "
                "use_nested_tensor = False"
            )
        if not input.is_floating_point():
            raise DtypeError(f"{type(self).__name__} takes floating-point inputs, got {input.dtype}")
        if self.input_dims is not None and input.dim() != self.input_dims:
            raise ConfigError(
                f"{type(self).__name__} takes inputs of {self.input_dims} dims, got shape {tuple(input.shape)}"
            )

    def to_float(self) -> nn.Module:
        """The plain layer with the stored weights, masked ones 0; this one stays as it is."""
        plain: Any = super().to_float()
        strip_quantizers(plain)
        return plain

    def to_deploy(self, *, norm: nn.Module | None = None, given: ActivationQuantizer | None = None) -> nn.Module:
        """A layer that computes with the quantized weight as it is stored; this one stays as it is.

        ``norm``: a batch norm behind the layer that becomes part of it. ``given``: the quantizer of another module
        that the input comes from.
        """
        for path, quantizer in self.named_modules():
            if isinstance(quantizer, Phased):
                check_ready(quantizer, path)
        return self.deployed(norm, given)

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        """The same, whether or not there are ranges."""
        raise UnsupportedLayerError(f"{type(self).__name__} can't be deployed: it stays as it is")

    @property
    def scale(self) -> Tensor:
        """The scales of the weight as it is."""
        return self._weight_grid()[0]

    @property
    def zero_point(self) -> Tensor:
        """The zero points of the weight: zeros."""
        return self._weight_grid()[1]

    def _weight_grid(self) -> tuple[Tensor, Tensor]:
        found = [name for name in self.maskable if self._modules.get(name + _SUFFIX) is not None]
        if not found:
            raise ConfigError(f"this {type(self).__name__} has no quantized weight: its config has weight=None")
        if len(found) > 1:
            raise ConfigError(
                f"this {type(self).__name__} has the weights {', '.join(found)}: ask {found[0]}{_SUFFIX}.grid_of"
            )
        quantizer: Any = self._modules[found[0] + _SUFFIX]
        return quantizer.grid_of(self.masked(found[0]))


def check_ready(quantizer: Phased, path: str) -> None:
    """Raise where a quantizer does not quantize yet, or is switched off."""
    obstacle = unready(quantizer)
    if obstacle:
        raise CalibrationError(f"{getattr(quantizer, 'layer_name', None) or path} {obstacle}")


def unready(quantizer: Phased) -> str:
    """Why the grid of a quantizer is not final; "" where it is."""
    if not quantizer.enabled:
        return "is switched off: fxslim.quantization.switch_quantizers(model, True) first"
    needed = getattr(quantizer, "batches_needed", getattr(quantizer, "start_step", 0))
    missing = needed - quantizer.batches_seen
    if missing <= 0:
        return ""
    return (
        f"has seen {quantizer.batches_seen} of {needed} batches: train on {missing} more, or choose ranges with "
        "fxslim.calibrating(model)"
    )


def stored_weight(layer: QuantizedLayer, name: str) -> StoredWeight | None:
    """What the quantizer of this weight makes of it now; None where it is switched off."""
    quantizer = layer._modules[name + _SUFFIX]
    assert isinstance(quantizer, WeightQuantizer)
    if not quantizer.enabled:
        return None
    if quantizer.batches_seen < quantizer.start_step:
        raise CalibrationError(
            f"{quantizer.described()} is not quantized yet: it has seen {quantizer.batches_seen} of "
            f"start_step={quantizer.start_step} training batches: train on"
        )
    folded = layer.__dict__.get("_folded")
    factors = None if folded is None else folded_scale(real_twin(folded[0]))
    return StoredWeight(real_twin(quantizer), real_twin(layer).masked(name).detach(), factors)


def strip_quantizers(layer: nn.Module) -> None:
    """Take away what ``start_quantizing`` added."""
    for name in [name for name in (*layer._modules, *vars(layer)) if name.endswith(_SUFFIX)]:
        layer._modules.pop(name, None)
        layer.__dict__.pop(name, None)
    layer.__dict__.pop("quant_config", None)
    layer.__dict__.pop("_folded", None)
    forget_neighbours(layer)
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is refresh_if_due]:
        del hooks[key]
