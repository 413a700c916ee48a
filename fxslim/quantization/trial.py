# SPDX-License-Identifier: Apache-2.0
"""Runs a quantized model once before anything is final: it must work, and read no weight past its quantizer."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from fxslim.errors import PlanError, UnsupportedLayerError
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import undisturbed
from fxslim.graph.weight_reads import memory_of
from fxslim.graph.weight_uses import WeightUses, ignored, watched
from fxslim.nn import QuantizedLayer
from fxslim.nn.handed_over_quantized import stop_quantizing_inputs
from fxslim.nn.quantizers import WeightQuantizer


def try_quantized(model: nn.Module, examples: Iterable[Inputs]) -> None:
    """Run the examples in eval mode; nothing of the model is changed."""
    weights = _quantized_weights(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    states = dict(model.named_parameters())
    past: dict[str, str] = {}

    def note(name: str, reader: str) -> None:
        if not isinstance(model.get_submodule(reader), WeightQuantizer):
            past.setdefault(name, reader)

    uses = WeightUses(model, {name: states[name] for name in weights.values()}, ignored, note)
    handles = [
        model.get_submodule(quantizer).register_forward_hook(functools.partial(_stands_for, uses, weight))
        for quantizer, weight in weights.items()
    ]
    try:
        for inputs in examples:
            if inputs.have_values:
                _run(model, inputs, uses)
    finally:
        for handle in handles:
            handle.remove()
    for name, reader in past.items():
        raise UnsupportedLayerError(
            f"{name}: {reader or 'the model'} reads the stored weight itself, past its quantizer: read it anew as "
            ".weight in each forward, or name the layer in skip=. Nothing was changed"
        )


def _quantized_weights(model: nn.Module) -> dict[str, str]:
    """{quantizer: weight} by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            for attribute in module.maskable:
                if isinstance(module._modules.get(f"{attribute}_quantizer"), WeightQuantizer):
                    path = f"{name}." if name else ""
                    found[f"{path}{attribute}_quantizer"] = f"{path}{attribute}"
    return found


def _start_quantizing(model: nn.Module) -> None:
    """Before its first step of quantization a quantizer gives the stored weight itself."""
    for module in model.modules():
        if isinstance(module, WeightQuantizer) and module.batches_seen < module.start_step:
            module.batches_seen = module.start_step


def _stands_for(uses: WeightUses, weight: str, module: nn.Module, args: Any, output: Any) -> None:
    """What a quantizer makes of a weight is used in its place."""
    if memory_of(output) != memory_of(args[0]):
        uses.copies[memory_of(output)] = weight, output
        if uses.reads is not None:
            uses.reads.made.pop(memory_of(output), None)


def _run(model: nn.Module, inputs: Inputs, uses: WeightUses) -> None:
    try:
        with undisturbed(model, training=False), watched(model, uses):
            _start_quantizing(model)
            try:
                inputs.copied().run(model)
            finally:
                stop_quantizing_inputs(model)
    except Exception as error:
        raise PlanError(
            f"the quantized model's forward failed on {inputs} ({type(error).__name__}: {error}). Nothing was changed"
        ) from error
    finally:
        uses.forget_copies()
