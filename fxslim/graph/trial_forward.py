# SPDX-License-Identifier: Apache-2.0
"""Runs a masked model once before anything is final: it must work, and read no weight past its mask."""

import itertools
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from fxslim.batches import Data
from fxslim.errors import PlanError, UnsupportedLayerError
from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import undisturbed
from fxslim.graph.watched_runs import run_all
from fxslim.graph.weight_uses import WeightUses, ignored, watched


def try_forward(model: nn.Module, names: Iterable[str], examples: Iterable[Inputs], data: Data | None) -> None:
    """Run the examples, or else the first batch of ``data``; ``names`` are the weights that have masks."""
    states = dict(model.named_parameters())
    if any(parameter.is_meta for parameter in states.values()):
        return
    past: dict[str, str] = {}

    def note(name: str, reader: str) -> None:
        past.setdefault(name, reader)

    uses = WeightUses(model, {name: states[name] for name in names}, ignored, note)
    examples = [inputs for inputs in examples if inputs.have_values]
    for inputs in examples:
        _run(model, inputs, uses)
    if data is not None and not examples:
        first = replace(data, batches=list(itertools.islice(data, 1)))
        run_all(model, first, uses, lambda number: None)
    for name, reader in past.items():
        raise UnsupportedLayerError(
            f"{name}: {reader or 'the model'} reads the stored weight itself, past its mask (kept from before, or "
            f"taken from _parameters): read it anew as .weight in each forward, or name the layer in skip=. "
            "Nothing was changed"
        )


def _run(model: nn.Module, inputs: Inputs, uses: WeightUses) -> None:
    try:
        with undisturbed(model, training=False), watched(model, uses):
            inputs.copied().run(model)
    except Exception as error:
        raise PlanError(
            f"the masked model's forward failed on {inputs} ({type(error).__name__}: {error}). Nothing was changed"
        ) from error
    finally:
        uses.forget_copies()
