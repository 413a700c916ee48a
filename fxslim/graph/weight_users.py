# SPDX-License-Identifier: Apache-2.0
"""Who reads the weights of layers past the layers' own forwards."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxslim.batches import Data
from fxslim.errors import ConfigError
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import undisturbed
from fxslim.graph.watched_runs import run_all
from fxslim.graph.weight_uses import WeightUses, ignored, watched
from fxslim.graph.weights_in_code import users_in_code

_OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear
# These hand their layers' weights to a function.
_HAND_OVER = {"ShiftedWindowAttention", "ShiftedWindowAttentionV2"}


def find_users(model: nn.Module, examples: Iterable[Inputs], data: Data | None) -> dict[str, str]:
    """For each weight that others than its layer read, a module in whose forward it is used: {weight: module}.

    That is the layer itself where its own forward is called too. As far as one forward shows; without one what is
    known by the names of classes, and what forwards say in so many words.
    """
    examples = list(examples)
    if not examples and data is None:
        return users_in_code(model) | _users_by_kind(model)
    weights = {
        name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1 and not parameter.is_meta
    }
    readers: dict[str, list[str]] = {}
    uses = WeightUses(model, weights, ignored, lambda name, module: readers.setdefault(name, []).append(module))
    with torch.inference_mode(False), undisturbed(model, training=False), torch.no_grad():
        for inputs in examples:
            _run(model, inputs, uses)
            uses.forget_copies()
    if data is not None:
        run_all(model, replace(data, batches=_first(data)), uses, lambda number: None)
    return _users_by_kind(model) | _users_seen(model, readers)


def _run(model: nn.Module, inputs: Inputs, uses: WeightUses) -> None:
    try:
        with watched(model, uses):
            inputs.copied().run(model)
    except Exception as error:
        raise ConfigError(
            f"the model's forward failed on example_inputs {inputs}: {type(error).__name__}: {error}; give inputs that "
            "the model takes"
        ) from error


def _users_by_kind(model: nn.Module) -> dict[str, str]:
    """What is known without a forward."""
    found = {}
    for name, module in model.named_modules():
        of_kind = _HAND_OVER & {base.__name__ for base in type(module).__mro__}
        # The counterpart of nn.MultiheadAttention masks its out_proj by itself; subclasses have none.
        heir = isinstance(module, nn.MultiheadAttention) and type(module) is not nn.MultiheadAttention
        for child, layer in module.named_children():
            if of_kind or (heir and type(layer) is _OUT_PROJ):
                found[f"{name}.{child}.weight".lstrip(".")] = name
    return found


def _users_seen(model: nn.Module, readers: Mapping[str, list[str]]) -> dict[str, str]:
    found = {}
    for name, modules in readers.items():
        layer, _, attribute = name.rpartition(".")
        owner = model.get_submodule(layer.rpartition(".")[0])
        if type(owner) is nn.MultiheadAttention and attribute == "weight" and layer.endswith("out_proj"):
            modules = [module for module in modules if module != layer.rpartition(".")[0]]
        if set(modules) - {layer}:
            found[name] = layer if layer in modules else modules[0]
    return found


def _first(data: Data) -> list[Any]:
    return [batch for batch, _ in zip(data, range(1), strict=False)]
