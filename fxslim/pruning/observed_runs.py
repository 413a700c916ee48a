# SPDX-License-Identifier: Apache-2.0
"""One forward in float64 and all that is compared of it: outputs, those of named modules, values behind decisions."""

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxslim.errors import ConfigError, unknown_name
from fxslim.graph.double_floats import in_double
from fxslim.graph.inputs import Inputs, output_tensors
from fxslim.graph.recording import undisturbed
from fxslim.pruning.decisions import Decision, RepeatedDecisions, TakenDecisions

# Where a tensor comes from that the model itself returns.
MODEL = "the model"
_DROPPING = frozenset(
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout".split()
)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Tensors with where each comes from, and the decisions of a forward (``repeated`` where it was given them)."""

    outputs: list[tuple[str, Tensor]]
    decisions: Sequence[Decision] = ()
    repeated: RepeatedDecisions | None = None

    @property
    def shapes(self) -> list[torch.Size]:
        return [value.shape for _, value in self.outputs]


class _NoDropout(TorchFunctionMode):
    """Which entries are dropped depends on the number of channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if getattr(func, "__name__", "") in _DROPPING else func(*args, **(kwargs or {}))


def modules_at(model: nn.Module, at: Iterable[str]) -> list[str]:
    """Names of the modules that names and globs mean.

    >>> modules_at(nn.Sequential(nn.ReLU(), nn.ReLU()), ["[01]"])
    ['0', '1']
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for item in [at] if isinstance(at, str) else at:
        matching = [name for name in names if name == item or fnmatch.fnmatchcase(name, item)]
        if not matching:
            raise ConfigError("at: " + unknown_name("module", item, names))
        found |= dict.fromkeys(matching)
    return list(found)


@contextlib.contextmanager
def _collected(model: nn.Module, at: Sequence[str], found: list[tuple[str, Tensor]]) -> Iterator[None]:
    """What the named modules return is collected, at every call."""
    handles = []
    for name in at:

        def collect(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
            found.extend((name, tensor.clone()) for tensor in output_tensors(result))

        handles.append(model.get_submodule(name).register_forward_hook(collect))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    inputs: Inputs,
    *,
    training: bool = False,
    at: Sequence[str] = (),
    decisions: Sequence[Decision] | None = None,
) -> Observation:
    """Run a model without gradient; decisions are those given, or its own.

    Random numbers are the same in every run; in train mode nothing is dropped.
    """
    found: list[tuple[str, Tensor]] = []
    mode = TakenDecisions() if decisions is None else RepeatedDecisions(decisions)
    dropping = _NoDropout() if training else contextlib.nullcontext()
    with undisturbed(model, training=training), torch.no_grad(), _collected(model, at, found), in_double(), dropping:
        given = inputs.copied()
        with mode:
            outputs = given.run(model)
    leaves = [(MODEL, value) for value in output_tensors(outputs)] + found
    wide = [(where, torch.view_as_real(value) if value.is_complex() else value) for where, value in leaves]
    return Observation(
        outputs=[(where, value.double()) for where, value in wide],
        decisions=mode.all if isinstance(mode, TakenDecisions) else mode.decisions,
        repeated=mode if isinstance(mode, RepeatedDecisions) else None,
    )
