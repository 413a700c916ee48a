# SPDX-License-Identifier: Apache-2.0
"""How batches of a user's data run and are scored."""

import types

import pytest
import torch
from torch import nn

from fxslim.batches import Data, as_data, repeatable
from fxslim.errors import ConfigError

MODEL = nn.Linear(3, 2)
X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class Two(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + 2 * b


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], {"input": X}, ({"input": X}, Y)])
def test_a_batch_runs_in_every_form(batch: object) -> None:
    assert torch.equal(as_data([batch]).forward(MODEL, batch), MODEL(X))


def test_the_first_element_may_be_several_inputs() -> None:
    batch = ((X, X), Y)
    assert torch.equal(as_data([batch]).forward(Two(), batch), 3 * X)


def test_the_loss_is_cross_entropy_or_the_one_that_the_outputs_bring() -> None:
    expected = nn.functional.cross_entropy(MODEL(X), Y)
    assert torch.equal(as_data([(X, Y)]).score(MODEL, (X, Y)), expected)
    brought = torch.tensor(7.0)
    for outputs in ({"loss": brought}, types.SimpleNamespace(loss=brought)):
        assert as_data([], forward=lambda model, batch, outputs=outputs: outputs).score(MODEL, X) is not None
        assert float(as_data([], forward=lambda model, batch, outputs=outputs: outputs).score(MODEL, X)) == 7.0
    outputs = types.SimpleNamespace(logits=MODEL(X), loss=None)
    assert torch.equal(as_data([], forward=lambda model, batch: outputs).score(MODEL, (X, Y)), expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no batches"),
        (iter([]), "has no batches"),
        (X, r"a tensor of shape \(4, 3\), not batches"),
        ("digits", "a str, not batches"),
    ],
)
def test_data_that_is_none(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(Data(batches=data))


def test_errors_name_what_was_given() -> None:
    with pytest.raises(ConfigError, match="iterable of batches, got a int"):
        as_data(3)
    with pytest.raises(ConfigError, match=r"a batch of data is a tensor of shape \(4, 3\) and has no target"):
        as_data([X]).score(MODEL, X)
    with pytest.raises(ConfigError, match="returns tuple, which cross entropy can't score"):
        as_data([X], forward=lambda model, batch: (1, 2)).score(MODEL, (X, Y))
    with pytest.raises(ConfigError, match=r"must return one number, a tensor, but returned a tensor of shape \(2,\)"):
        as_data([X], loss=lambda outputs, batch: torch.zeros(2)).score(MODEL, X)
    with pytest.raises(ConfigError, match="loss of a batch is nan"):
        as_data([X], loss=lambda outputs, batch: outputs.sum() * float("nan")).score(MODEL, X)


def test_an_iterator_is_kept_while_it_is_read() -> None:
    data = repeatable(as_data(iter([X, X + 1])))
    first = next(iter(data))
    assert torch.equal(first, X)
    assert [torch.equal(a, b) for a, b in zip(data, [X, X + 1], strict=True)] == [True, True]
    assert len(list(data)) == 2
