# SPDX-License-Identifier: Apache-2.0
"""Quantizers: modules between a tensor and its values on a grid."""

from fxslim.errors import ConfigError
from fxslim.nn.quant_config import ActivationQuant
from fxslim.nn.quantizers.activations import ActivationQuantizer as ActivationQuantizer
from fxslim.nn.quantizers.activations import each_activation_quantizer as each_activation_quantizer
from fxslim.nn.quantizers.learned_clips import LsqPlusActivations, PactActivations, UlqActivations
from fxslim.nn.quantizers.learned_scale import LsqActivations
from fxslim.nn.quantizers.observed import MinMaxActivations, StaticActivations
from fxslim.nn.quantizers.phases import Phased as Phased
from fxslim.nn.quantizers.weights import WeightQuantizer as WeightQuantizer
from fxslim.nn.quantizers.weights import weight_quantizer as weight_quantizer

_BY_METHOD: dict[str, type[ActivationQuantizer]] = {
    "ulq": UlqActivations, "lsq": LsqActivations, "lsq+": LsqPlusActivations, "pact": PactActivations,
    "min_max": MinMaxActivations, "static": StaticActivations,
}  # fmt: skip


def activation_quantizer(config: ActivationQuant, start_step: int = 0) -> ActivationQuantizer:
    """The quantizer that a config asks for.

    >>> from fxslim.nn.quant_config import ActivationQuant
    >>> activation_quantizer(ActivationQuant(method="min_max"))
    MinMaxActivations(8 bit, min_max)
    """
    if config.format != "int":
        raise ConfigError(f"activation.format={config.format!r}: layers quantize to integers only, give format='int'")
    return _BY_METHOD[config.method](config, start_step)
