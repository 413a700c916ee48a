# SPDX-License-Identifier: Apache-2.0
"""What a recording turns in torch is put back, also by one who was not there when it was turned."""

from typing import Any

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxslim.graph.torch_switches import TorchSwitches, plain_forwards
from tests.torch_switches import switches


class Dispatching(TorchDispatchMode):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_everything_is_put_back_any_number_of_times() -> None:
    before, kept = switches(), TorchSwitches()
    for _ in range(2):
        plain_forwards()
        torch.set_grad_enabled(False)
        Dispatching().__enter__()
        Functions().__enter__()
        now = switches()
        changed = {name for name, value in before.items() if now[name] != value}
        assert changed == {"grad", "fast path", "attention", "function modes", "dispatch modes", "stance"}
        kept.restore()
        kept.restore()
        assert switches() == before


def test_what_the_user_turned_stays_turned() -> None:
    with torch.autocast("cpu"), torch.no_grad(), torch.compiler.set_stance("force_eager"), Functions():
        before, kept = switches(), TorchSwitches()
        plain_forwards()
        assert not torch.is_autocast_enabled("cpu")
        torch.set_grad_enabled(True)
        kept.restore()
        assert switches() == before
        assert torch.is_autocast_enabled("cpu")
