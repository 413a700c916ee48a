# SPDX-License-Identifier: Apache-2.0
"""Quantized layers whose weight others hand to a function: both the weight and what it meets are quantized."""

from typing import Any

from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from fxslim.errors import UnsupportedLayerError
from fxslim.nn.handed_over import HandedOver
from fxslim.nn.qat_linear import LinearQAT
from fxslim.nn.quantizers import ActivationQuantizer

# The weights that a layer showed while its owner runs.
_SHOWN = "_shown_weights"
# Where an owner keeps the mode of its forward.
_MODE = "_quantizing_inputs"


class HandedOverLinearQAT(HandedOver, LinearQAT):
    """``LinearQAT`` whose attribute ``weight`` shows the quantized weight.

    While its owner runs, what is multiplied with that weight by ``F.linear`` goes through the input's quantizer.
    """

    def computed(self, name: str = "weight", scales: list[Tensor] | None = None) -> Tensor:
        weight = super().computed(name, scales)
        shown = self.__dict__.get(_SHOWN)
        if shown is not None:
            shown.append(weight)
        return weight

    def deployed(self, norm: nn.Module | None, given: ActivationQuantizer | None) -> nn.Module:
        raise UnsupportedLayerError(
            f"{type(self).__name__} can't be deployed: its weight is read as a float tensor by the module that it is in"
        )

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Here the input is quantized already.
        shown = self.__dict__.pop(_SHOWN, None)
        try:
            return super().forward(input, *args, **kwargs)
        finally:
            if shown is not None:
                self.__dict__[_SHOWN] = shown


class _QuantizingInputs(TorchFunctionMode):
    """Quantizes the inputs of products with the weights that these layers show."""

    def __init__(self, layers: list[HandedOverLinearQAT]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            for layer in self.layers:
                quantizer, shown = layer.input_quantizer, layer.__dict__.get(_SHOWN, ())
                if quantizer is not None and any(weight is given["weight"] for weight in shown):
                    given["input"] = quantizer(given["input"])
            args, kwargs = (), given
        return func(*args, **kwargs)


def quantize_inputs_within(owner: nn.Module) -> None:
    """While the owner runs, its own layers that hand weights over quantize their inputs too."""
    owner.register_forward_pre_hook(_enter)
    owner.register_forward_hook(_leave, always_call=True)


def _enter(owner: nn.Module, args: Any) -> None:
    if _MODE in owner.__dict__:
        _take_away(owner)
    layers = [layer for layer in owner.children() if isinstance(layer, HandedOverLinearQAT)]
    for layer in layers:
        layer.__dict__[_SHOWN] = []
    mode = _QuantizingInputs(layers)
    owner.__dict__[_MODE] = mode
    mode.__enter__()


def _leave(owner: nn.Module, args: Any, output: Any) -> None:
    mode = owner.__dict__.get(_MODE)
    if mode is not None:
        mode.__exit__(None, None, None)
        owner.__dict__.pop(_MODE, None)
        for layer in mode.layers:
            layer.__dict__.pop(_SHOWN, None)


def stop_quantizing_inputs(model: nn.Module) -> None:
    """Take away what forwards left that were interrupted, for which torch calls no hooks."""
    for module in model.modules():
        if _MODE in module.__dict__:
            _take_away(module)


def _take_away(owner: nn.Module) -> None:
    """The mode of a forward that never ended, wherever it is on torch's stack."""
    mode, above = owner.__dict__[_MODE], []
    while _len_torch_function_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
    owner.__dict__.pop(_MODE, None)
