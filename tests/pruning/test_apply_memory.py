# SPDX-License-Identifier: Apache-2.0
"""How much memory apply holds beside the model, at most: counted storage by storage while it runs."""

from itertools import pairwise
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxslim
from fxslim.graph.surgery import cutting


class Memory(TorchDispatchMode):
    """The most bytes that results of operators, and what was there before, held at one time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.most = 0
        for state in model.state_dict(keep_vars=True).values():
            self._see(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _see(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        self.alive[storage._cdata] = ref(storage), storage.nbytes()
        self.alive = {key: (storage, size) for key, (storage, size) in self.alive.items() if storage() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))


def size_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("widths", [(32, 512, 1024, 64), (512, 512, 512, 512, 512)])
def test_what_stays_and_the_old_whole(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer that is most of the model, or many alike: never much more than the model and half of it."""
    # As small beside the layers as in a model of usual size.
    monkeypatch.setattr(cutting, "_PIECE", 1 << 12)
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 8))
    whole = size_bytes(model)
    plan = fxslim.plan_pruning(model, torch.randn(1, widths[0]), ratio=0.6, target="params")
    with Memory(model) as memory:
        plan.apply(model)
    assert size_bytes(model) < 0.45 * whole
    assert 1.05 * whole < memory.most < 1.5 * whole
