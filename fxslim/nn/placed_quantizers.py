# SPDX-License-Identifier: Apache-2.0
"""Quantizers of what other modules give: of a block's sum, of a pool, of an activation."""

from typing import Any

from torch import Tensor, nn

from fxslim.nn.quant_config import ActivationQuant
from fxslim.nn.quantizers import ActivationQuantizer, activation_quantizer

OUTPUT_QUANTIZER = "output_quantizer"


def quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook. It knows only the module that it is called with, so that copies of a model are right."""
    quantizer = module._modules.get(OUTPUT_QUANTIZER)
    return output if quantizer is None or not isinstance(output, Tensor) else quantizer(output)


def place_output_quantizer(
    module: nn.Module, config: ActivationQuant, start_step: int, name: str
) -> ActivationQuantizer:
    """Add a quantizer to a module's output; a Sequential gets it as its last member, which runs by itself."""
    quantizer = activation_quantizer(config, start_step)
    state = next(iter([*module.parameters(), *module.buffers()]), None)
    if state is not None:
        quantizer.to(state.device)
    quantizer.layer_name = f"the output of {name}"  # type: ignore[assignment]
    quantizer.train(module.training)
    module.add_module(OUTPUT_QUANTIZER, quantizer)
    if type(module).forward is not nn.Sequential.forward:
        module.register_forward_hook(quantize_output)
    return quantizer
