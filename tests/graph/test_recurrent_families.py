# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU and RNN, layers and cells: hidden channels are pruned, gates stay together."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxslim
from tests.graph.proofs import check_family, randomise, stays

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}


class Tower(nn.Module):
    """Linear, recurrent layers, linear; ``states`` are learned first states."""

    def __init__(self, rnn: nn.RNNBase, *, inputs: int, states: int = 0, last: bool = False) -> None:
        super().__init__()
        self.stem, self.rnn, self.last = nn.Linear(5, inputs), rnn, last
        directions = 1 + rnn.bidirectional
        shape = (rnn.num_layers * directions, 1)
        first = [(*shape, rnn.proj_size or rnn.hidden_size), (*shape, rnn.hidden_size)]
        self.states = nn.ParameterList(torch.randn(size) for size in first[:states])
        self.head = nn.Linear((rnn.proj_size or rnn.hidden_size) * (1 if last else directions), 3)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0 if self.rnn.batch_first else 1]
        given = tuple(state.expand(-1, batch, -1) for state in self.states)
        states = () if not given else (given if len(given) > 1 else given[0],)
        y, h = self.rnn(torch.tanh(self.stem(x)), *states)
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h[-1] if self.last else y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_layers(kind: str, seed: int) -> None:
    pick = random.Random(f"{kind}{seed}")
    settings = {
        "num_layers": pick.choice([1, 2, 3]), "bias": pick.choice([True, False]),
        "batch_first": pick.choice([True, False]), "bidirectional": pick.choice([True, False]),
    }  # fmt: skip
    if kind == "lstm" and pick.random() < 0.5:
        settings["proj_size"] = pick.choice([4, 5])
    if kind == "rnn":
        settings["nonlinearity"] = pick.choice(["tanh", "relu"])
    hidden, states = pick.choice([7, 9, 12]), pick.choice([0, 1]) * (2 if kind == "lstm" else 1)
    model = Tower(KINDS[kind](6, hidden, **settings), inputs=6, states=states)
    check_family(model, torch.randn(3, 4, 5), prunes="stem rnn", ratio=0.3, seed=seed)
    rnn = model.rnn
    if rnn.proj_size:
        settings["proj_size"] = rnn.proj_size
    rebuilt = KINDS[kind](rnn.input_size, rnn.hidden_size, **settings)
    rebuilt.load_state_dict(rnn.state_dict())
    x = torch.randn(3, 4, rnn.input_size)
    torch.testing.assert_close(rebuilt(x)[0], rnn(x)[0])
    assert all(a is b for a, b in zip(rnn._flat_weights, rnn.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_last_state_of_one_layer(kind: str) -> None:
    check_family(Tower(KINDS[kind](6, 9), inputs=6, last=True), torch.randn(3, 4, 5), prunes="rnn")


@pytest.mark.parametrize("kind", KINDS)
def test_last_state_of_the_last_layer_is_proved(kind: str) -> None:
    model = randomise(Tower(KINDS[kind](6, 9, num_layers=2), inputs=6, last=True))
    x = torch.randn(3, 4, 5)
    plan = fxslim.plan_pruning(model, x, ratio=0.2, target="channels", importance="random")
    assert plan.verify(model, x).ok
    plan.apply(model)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind: str) -> None:
    check_family(Tower(KINDS[kind](6, 9), inputs=6), [torch.randn(7, 1, 5)], prunes="rnn")

    class Unbatched(Tower):
        def forward(self, x):
            return self.head(self.rnn(self.stem(x))[0])

    check_family(Unbatched(KINDS[kind](6, 9, bidirectional=True), inputs=6), torch.randn(7, 5), prunes="rnn")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sorted_lengths", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences(kind: str, sorted_lengths: bool, batch_first: bool) -> None:
    class Packed(Tower):
        def forward(self, x):
            lengths = torch.tensor([4, 3, 1] if sorted_lengths else [1, 4, 3])
            packed = pack_padded_sequence(self.stem(x), lengths, batch_first=batch_first, enforce_sorted=sorted_lengths)
            return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=batch_first)[0])

    model = Packed(KINDS[kind](6, 8, num_layers=2, bidirectional=True, batch_first=batch_first), inputs=6)
    check_family(model, torch.randn(3, 4, 5) if batch_first else torch.randn(4, 3, 5), prunes="stem rnn")


class Stepped(nn.Module):
    """A cell (or two) in a Python loop."""

    def __init__(self, kind: str, hidden: int, bias: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(hidden, 3)
        self.first, self.second = CELLS[kind](6, hidden, bias=bias), CELLS[kind](hidden, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a = b = None
        for step in self.stem(x).unbind(1):
            a = self.first(step, a)
            b = self.second(a[0] if isinstance(a, tuple) else a, b)
        return self.head(b[0] if isinstance(b, tuple) else b)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: str, bias: bool) -> None:
    model = check_family(Stepped(kind, 9, bias), torch.randn(2, 4, 5), prunes="stem first second", seed=int(bias))
    assert model.second.input_size == model.first.hidden_size < 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_from_outside_keeps_the_hidden_channels(kind: str) -> None:
    class Given(Tower):
        def forward(self, x, h):
            return self.head(self.rnn(self.stem(x), (h, h) if kind == "lstm" else h)[0])

    model = Given(KINDS[kind](6, 9), inputs=6)
    x, h = torch.randn(3, 4, 5), torch.randn(1, 4, 9)
    stays(model, (x, h), "rnn", "first state of rnn is given from outside")
    assert model.stem.out_features < 6


def test_an_encoder_gives_its_state_to_a_decoder() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.GRU(5, 9, num_layers=2), nn.GRU(5, 9, num_layers=2)
            self.head = nn.Linear(9, 3)

        def forward(self, x):
            return self.head(self.decoder(x, self.encoder(x)[1])[0])

    model = check_family(Translator(), torch.randn(3, 4, 5), prunes="encoder decoder")
    assert model.encoder.hidden_size == model.decoder.hidden_size < 9


def test_weights_lie_in_one_piece_after_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = randomise(Tower(nn.GRU(6, 9), inputs=6)), []
    plan = fxslim.plan_pruning(model, torch.randn(3, 4, 5), ratio=0.4, importance="random")
    monkeypatch.setattr(nn.GRU, "flatten_parameters", lambda self: sizes.append(self.weight_hh_l0.shape[1]))
    plan.apply(model)
    assert sizes == [model.rnn.hidden_size]
    assert sizes[0] < 9


def test_macs() -> None:
    cost = fxslim.trace(nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=3), torch.randn(7, 2, 6)).cost
    first, second, projection = 4 * 8 * (6 + 3), 4 * 8 * (6 + 3), 3 * 8
    assert cost.macs == 7 * 2 * (first + second + 2 * projection)
    assert fxslim.trace(nn.GRUCell(6, 8), torch.randn(5, 6)).cost.macs == 3 * 8 * (6 + 8)


def test_a_failed_apply_leaves_everything() -> None:
    class Literal(Tower):
        def forward(self, x):
            return self.head(self.rnn(self.stem(x))[0]) + torch.zeros(self.rnn.hidden_size).reshape(9).sum()

    model = randomise(Literal(nn.LSTM(6, 9, num_layers=2), inputs=6))
    plan = fxslim.plan_pruning(model, torch.randn(3, 4, 5), ratio=0.3, target="channels")
    before = copy.deepcopy(model)
    if any(cut.name.startswith("rnn.weight_hh") for cut in plan.cuts):
        with pytest.raises(fxslim.PlanError, match="written as a number"):
            plan.apply(model)
    assert {k: v for k, v in vars(model.rnn).items() if k.endswith("size")} == {
        k: v for k, v in vars(before.rnn).items() if k.endswith("size")
    }
    x = torch.randn(3, 4, 5)
    assert torch.equal(model(x), before(x))
