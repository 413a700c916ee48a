# SPDX-License-Identifier: Apache-2.0
"""Quantizers: modules between a tensor and its values on a grid."""

from torch import Tensor

from fxslim.nn.quant_config import ActivationQuant, WeightQuant
from fxslim.nn.quantizers.activations import ActivationQuantizer as ActivationQuantizer
from fxslim.nn.quantizers.activations import each_activation_quantizer as each_activation_quantizer
from fxslim.nn.quantizers.float_grids import FloatGridWeights, MinMaxFloatGrid, StaticFloatGrid
from fxslim.nn.quantizers.learned_clips import LsqPlusActivations, PactActivations, UlqActivations
from fxslim.nn.quantizers.learned_scale import LsqActivations
from fxslim.nn.quantizers.observed import MinMaxActivations, StaticActivations
from fxslim.nn.quantizers.phases import Phased as Phased
from fxslim.nn.quantizers.weights import ArqWeights, BinaryWeights, DorefaWeights, LsqWeights
from fxslim.nn.quantizers.weights import WeightQuantizer as WeightQuantizer
from fxslim.patterns.weight_layout import WeightLayout

_WEIGHTS: dict[str, type[WeightQuantizer]] = {
    "arq": ArqWeights, "lsq": LsqWeights, "dorefa": DorefaWeights, "binary": BinaryWeights,
}  # fmt: skip
_ACTIVATIONS: dict[str, type[ActivationQuantizer]] = {
    "ulq": UlqActivations, "lsq": LsqActivations, "lsq+": LsqPlusActivations, "pact": PactActivations,
    "min_max": MinMaxActivations, "static": StaticActivations,
}  # fmt: skip
_FLOAT_ACTIVATIONS: dict[str, type[ActivationQuantizer]] = {"min_max": MinMaxFloatGrid, "static": StaticFloatGrid}


def activation_quantizer(config: ActivationQuant, start_step: int = 0) -> ActivationQuantizer:
    """The quantizer that a config asks for.

    >>> from fxslim.nn.quant_config import ActivationQuant
    >>> activation_quantizer(ActivationQuant(method="min_max"))
    MinMaxActivations(8 bit, min_max)
    """
    known = _ACTIVATIONS if config.format == "int" else _FLOAT_ACTIVATIONS
    return known[config.method](config, start_step)


def weight_quantizer(config: WeightQuant, layout: WeightLayout, weight: Tensor, start_step: int = 0) -> WeightQuantizer:
    """The quantizer that a config asks for, ready for this weight."""
    kind = _WEIGHTS[config.method] if config.format == "int" else FloatGridWeights
    made = kind(config, layout, start_step)
    made.to(weight.device)
    made.attach(weight)
    made.reread()
    return made
