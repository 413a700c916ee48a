# SPDX-License-Identifier: Apache-2.0
"""How long a model's forward takes here."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import undisturbed

_WARM_UPS, _ROUNDS = 2, 9


def forward_milliseconds(model: nn.Module, examples: Sequence[Inputs]) -> float:
    """The median over some rounds, in eval mode, of one forward on each example."""
    times = []
    state = next(iter([*model.parameters(), *model.buffers()]), None)
    on_gpu = state is not None and state.is_cuda
    with undisturbed(model, training=False), torch.inference_mode():
        for round_number in range(_WARM_UPS + _ROUNDS):
            start = time.perf_counter()
            for example in examples:
                example.run(model)
            if on_gpu:
                torch.cuda.synchronize()
            if round_number >= _WARM_UPS:
                times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
