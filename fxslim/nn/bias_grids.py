# SPDX-License-Identifier: Apache-2.0
"""Biases as integer kernels add them: whole steps of the sums, the scale of the input times that of the weight.

Sums and biases are int32 there. A layer in eval mode, a file and a deployed layer all get their bias here, so that they
compute the same. The quantizers that read the sums in eval mode are told the steps.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxslim.nn.norm_folding import folded_norm, in_double
from fxslim.nn.quant_config import WeightQuant
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.nn.quantizers.gradient_routes import straight_through
from fxslim.nn.quantizers.integer_sums import Channels
from fxslim.nn.quantizers.onnx_lowering import is_lowering, telling
from fxslim.nn.quantizers.real_values import real_twin, without_modes
from fxslim.nn.quantizers.stored_weights import StoredWeight
from fxslim.nn.small_weights import storage_of

_LARGEST = 2**31 - 1
# What a bias takes of int32 where the weight makes room for it; of float32's exponents the step of the sums.
_ROOM, _TINY = 2.0**30, 2.0**-120
# Where a layer keeps its neighbours.
NEIGHBOURS = "_neighbours"


class Neighbours(NamedTuple):
    """What a layer's sums have to do with besides the layer. A tuple, so that none becomes its submodule.

    ``norm``: the batch norm behind it that deployment folds in. ``source``: the quantizer elsewhere that its input
    comes from. ``readers``: those elsewhere that read its sums, and where the channels are there.
    """

    norm: nn.Module | None = None
    source: nn.Module | None = None
    readers: tuple[tuple[nn.Module, Channels], ...] = ()


def remember_neighbours(layer: nn.Module, neighbours: Neighbours) -> None:
    """In place of those that it knew."""
    layer.__dict__[NEIGHBOURS] = neighbours


def forget_neighbours(layer: nn.Module) -> None:
    """The layer stands for itself again."""
    layer.__dict__.pop(NEIGHBOURS, None)


def _neighbours(layer: nn.Module) -> Neighbours:
    return Neighbours(*vars(layer).get(NEIGHBOURS, ()))


def norm_behind(layer: Any) -> nn.Module | None:
    """The batch norm that deployment folds into the layer, where that is known."""
    return None if layer.output_quantizer is not None else _neighbours(layer).norm


def has_integers(config: WeightQuant | None) -> bool:
    """Whether such a weight is one that integer kernels multiply: whole numbers of 8 bits, one scale each output."""
    return config is not None and config.granularity != "group" and storage_of(config) in ("int4", "int8")


def input_scale(layer: Any, name: str = "input", given: ActivationQuantizer | None = None) -> Tensor | None:
    """The scale of what the layer multiplies; None where that is not on a grid of 8 bits, or on which is not known."""
    quantizer = getattr(layer, f"{name}_quantizer", None)
    if quantizer is None:
        quantizer = given or _neighbours(layer).source
    if not isinstance(quantizer, ActivationQuantizer):
        return None
    config = quantizer.config
    if config.format != "int" or config.bits > 8 or not quantizer.is_quantizing:
        return None
    return (real_twin(quantizer) if is_lowering() else quantizer).grid()[0].detach()


@torch.no_grad()
def integer_bias(bias: Tensor, scale_of_input: Tensor | None, scale: Tensor | None) -> Tensor:
    """What integer kernels add to sums of products; ``scale``: of the weight.

    A bias that int32 does not hold, or whose step is not known, stays as it is.
    """
    return _in_steps(bias, _step(scale_of_input, scale)).to(bias.dtype)


@torch.no_grad()
def folded_bias(bias: Tensor | None, scale_of_input: Tensor | None, scale: Tensor | None, norm: nn.Module) -> Tensor:
    """The same where a norm behind has become part of the layer."""
    factor, shift = folded_norm(norm)
    exact = shift if bias is None else bias * factor + shift
    return _in_steps(exact, _step(scale_of_input, scale, factor))


@torch.no_grad()
def bias_before(
    norm: nn.Module | None, bias: Tensor | None, scale_of_input: Tensor | None, scale: Tensor | None
) -> Tensor | None:
    """What a layer adds whose norm goes on by itself, so that its results are those of ``folded_bias``."""
    if scale_of_input is None or scale is None or (bias is None and norm is None):
        return bias
    if norm is None:
        return None if bias is None else integer_bias(bias, scale_of_input, scale)
    factor, shift = folded_norm(norm)
    exact = shift if bias is None else bias * factor + shift
    moved = (_in_steps(exact, _step(scale_of_input, scale, factor)) - exact) / factor
    # Where the norm lets nothing pass, nothing can be said before it.
    moved = moved.nan_to_num(0.0, 0.0, 0.0)
    return moved.to(scale.dtype) if bias is None else (bias + moved).to(bias.dtype)


def bias_in_eval(layer: Any, bias: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """The bias that a layer in eval mode adds to sums of products with a weight of this scale; its gradient as ever."""
    norm = norm_behind(layer)
    if scale is None or (norm is None and bias is None):
        return bias
    if is_lowering():
        with without_modes(), telling():
            twin = real_twin(layer)
            return bias_before(None if norm is None else real_twin(norm), twin.bias, input_scale(twin), scale)
    value = bias_before(norm, bias, input_scale(layer), scale)
    return value if bias is None or value is None or value is bias else straight_through(value, bias)


@torch.no_grad()
def tell_readers(layer: Any, scale: Tensor | None) -> None:
    """Before the layer's arithmetic in eval mode: quantizers that read its sums get to know the steps of these."""
    own = layer.output_quantizer
    # Channels of convolutions come before the dims of the kernel.
    channels = Channels(-1 - len(getattr(layer, "kernel_size", ())))
    readers = _neighbours(layer).readers if own is None else ((own, channels),)
    norm = norm_behind(layer)
    if not readers or scale is None or is_lowering() or (norm is not None and norm.training):
        return
    step = _step(input_scale(layer), scale, None if norm is None else folded_norm(norm)[0])
    for reader, where in readers:
        if step is not None and isinstance(reader, ActivationQuantizer):
            reader.expect_sums(step, where)


@torch.no_grad()
def deployed_bias(
    layer: Any, scale: Tensor | None, norm: nn.Module | None = None, given: ActivationQuantizer | None = None
) -> Tensor | None:
    """The bias of a layer on its own, or with a norm folded in, that computes what the model does in eval mode.

    Of a norm that the layer does not know the model rounds nothing.
    """
    bias = getattr(layer, "bias", None)
    before, known = input_scale(layer, given=given), norm_behind(layer)
    if norm is not None and norm is known:
        return folded_bias(bias, before, scale, norm).to(layer.stored().dtype)
    made = bias_before(known, bias, before, scale)
    if norm is not None:
        return folded_bias(made, None, None, norm).to(layer.stored().dtype)
    if made is None and known is not None:
        # Whether there is a bias is structure: it can't depend on ranges, which a fresh model does not have yet.
        made = torch.zeros_like(folded_norm(known)[1], dtype=layer.stored().dtype)
    return None if made is None else made.detach().clone()


@torch.no_grad()
def make_room_for_bias(layer: Any, name: str, weight: StoredWeight) -> None:
    """Coarser steps for outputs whose bias int32 does not hold in steps of their sums, as that of a dead filter.

    ONNX Runtime stores float biases as int32 itself, and cuts off what that does not hold. Beside such a bias the
    products are next to nothing.
    """
    bias, scale = layer._parameters.get(name.replace("weight", "bias")), weight.scale_of_outputs
    before = [input_scale(layer, one) for one in getattr(layer, "input_names", ("input",))]
    if bias is None or scale is None or not before or any(one is None for one in before):
        return
    finest = torch.cat([one.reshape(-1) for one in before if one is not None]).double().amin()
    least = (in_double(bias).abs() / _ROOM).clamp(min=_TINY) / finest
    if least.isfinite().all():
        weight.coarsen(least)


def _step(scale_of_input: Tensor | None, scale: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
    """In the order, and the precision, in which a file's scales are multiplied."""
    if scale_of_input is None or scale is None:
        return None
    scale = scale.reshape(-1)
    if factor is not None:
        scale = scale * torch.where(factor == 0, 1, factor.abs()).to(scale.dtype)
    return scale_of_input.reshape(-1).to(scale.dtype) * scale


def _in_steps(bias: Tensor, step: Tensor | None) -> Tensor:
    if step is None:
        return bias
    steps = (in_double(bias) / in_double(step)).round()
    held = (step > 0) & (steps.abs() <= _LARGEST)
    return torch.where(held, steps.to(step.dtype) * step, bias.to(step.dtype))
