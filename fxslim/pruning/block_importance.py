# SPDX-License-Identifier: Apache-2.0
"""How much each block of a deep model changes what passes through it: which blocks to leave out."""

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fxslim.batches import Forward, as_data
from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.inputs import output_tensors
from fxslim.graph.recording import undisturbed


def measure_blocks(
    model: nn.Module, data: Iterable[Any], blocks: str, *, forward: Forward | None = None
) -> dict[str, float]:
    """1 - cosine between input and output of each block, in the mean over all positions of the data.

    ``blocks`` is a glob of module names, for instance ``"encoder.layer.*"``. ``forward(model, batch)`` runs
    the model on a batch, by default on its first element. The lowest may be left out first (see ``BlockMap``).

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    >>> measure_blocks(net, [torch.randn(2, 4)], "1")["1"] < 1e-12
    True
    """
    batches, depth = as_data(data, forward), blocks.count(".")
    names = [n for n, _ in model.named_modules() if fnmatch.fnmatchcase(n, blocks) and n.count(".") == depth]
    if not names:
        raise ConfigError("blocks: " + unknown_name("module", blocks, [n for n, _ in model.named_modules()]))
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = _first((args, kwargs)), _first(output)
            if before is None or after is None or before.shape != after.shape:
                raise ConfigError(f"block {name}: its output has not the shape of its input")
            cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            sums[name][0] += float((1 - cosine).sum())
            sums[name][1] += cosine.numel()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True) for name in names]
    try:
        with undisturbed(model, training=False), torch.no_grad():
            for batch in batches:
                batches.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, (_, count) in sums.items() if count == 0]
    if unseen:
        raise ConfigError(f"blocks {unseen} did not run on this data")
    return {name: max(0.0, total / count) for name, (total, count) in sums.items()}


def _first(values: Any) -> Tensor | None:
    return next((value for value in output_tensors(values) if value.is_floating_point()), None)
