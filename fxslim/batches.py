# SPDX-License-Identifier: Apache-2.0
"""Batches of a user's data: how a model runs on one, and how its outputs are scored."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxslim.errors import ConfigError

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a dict is its keyword arguments, of a tuple or list the first element is the input.

    That input may itself be a tuple of positional arguments or a dict. Tensors are moved to the model's device.

    >>> run_batch(nn.Flatten(), (torch.zeros(2, 3, 4), torch.tensor([0, 1]))).shape
    torch.Size([2, 12])
    """
    given = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    state = next(iter([*model.parameters(), *model.buffers()]), None)
    if state is not None:
        given = tree_map(lambda value: value.to(state.device) if isinstance(value, Tensor) else value, given)
    if isinstance(given, Mapping):
        return model(**given)
    return model(*given) if isinstance(given, tuple) else model(given)


def score_batch(outputs: Any, batch: Any) -> Tensor:
    """The loss that the outputs bring along, as those of Hugging Face; else cross entropy with the batch's second.

    >>> float(score_batch(torch.tensor([[0.0, 0.0]]), (None, torch.tensor([1]))))
    0.6931471824645996
    """
    brought = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(brought, Tensor):
        return brought
    scores = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(scores, Tensor):
        raise ConfigError(
            f"the model returns {type(outputs).__name__}, which cross entropy can't score: give loss(outputs, batch)"
        )
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise ConfigError(
            f"a batch of data is {_described(batch)} and has no target as its second element: "
            "give loss(outputs, batch), or batches of (input, target)"
        )
    return nn.functional.cross_entropy(scores, batch[1].to(scores.device))


@dataclass(frozen=True, kw_only=True)
class Data:
    """A user's batches, what ``forward(model, batch)`` runs and what ``loss(outputs, batch)`` scores."""

    batches: Iterable[Any]
    forward: Forward = run_batch
    loss: Loss = score_batch

    def __iter__(self) -> Iterator[Any]:
        """All batches; an error if there are none."""
        if isinstance(self.batches, Tensor | str | bytes):
            raise ConfigError(
                f"data is {_described(self.batches)}, not batches: give a list of them or a DataLoader, [data] for one"
            )
        empty = True
        for batch in self.batches:
            empty = False
            yield batch
        if empty:
            raise ConfigError(
                "data has no batches; an iterator that was read before is empty: give a list or a DataLoader"
            )

    def score(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch: a finite number."""
        value = self.loss(self.forward(model, batch), batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ConfigError(
                f"loss(outputs, batch) must return one number, a tensor, but returned {_described(value)}"
            )
        if not torch.isfinite(value.detach()).all():
            raise ConfigError(f"the loss of a batch is {float(value.detach())}: data or weights have NaN or infinity")
        return value.reshape(())


def as_data(data: Any, forward: Forward | None = None, loss: Loss | None = None) -> Data:
    """The arguments ``data``, ``forward`` and ``loss`` that functions of fxslim take, with their defaults."""
    if isinstance(data, Data):
        return data
    if not isinstance(data, Iterable):
        raise ConfigError(f"data must be an iterable of batches, got {_described(data)}")
    return Data(batches=data, forward=forward or run_batch, loss=loss or score_batch)


class KeptBatches:
    """Batches of an iterator that can be read only once, kept while they are read so that they can be read again."""

    def __init__(self, source: Iterable[Any]) -> None:
        self.source, self.seen = iter(source), list[Any]()

    def __iter__(self) -> Iterator[Any]:
        yield from list(self.seen)
        for batch in self.source:
            self.seen.append(batch)
            yield batch


def repeatable(data: Data) -> Data:
    """Data that can be read any number of times: planning may rank again where it learns more about the model.

    >>> data = repeatable(Data(batches=iter([1, 2])))
    >>> list(data), list(data)
    ([1, 2], [1, 2])
    """
    once = isinstance(data.batches, Iterator)
    return replace(data, batches=KeptBatches(data.batches)) if once else data


def given_data(data: Any, forward: Forward | None) -> Data | None:
    """The arguments ``data`` and ``forward`` of a plan's ``apply``."""
    if data is None and forward is not None:
        raise ConfigError("forward= says how batches are run: give data= with it")
    return None if data is None else repeatable(as_data(data, forward))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
