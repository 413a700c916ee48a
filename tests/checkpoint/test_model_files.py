# SPDX-License-Identifier: Apache-2.0
"""One file for a compressed model: round trips, tied weights, optimizers, damaged and foreign files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxslim
from fxslim import CheckpointError
from tests.graph.random_networks import RandomNetwork

X = torch.randn(2, 3, 8, 8)


def pruned(times: int = 1) -> nn.Module:
    model = RandomNetwork(5)
    for _ in range(times):
        fxslim.prune(model, X, ratio=0.25)
    return model


@pytest.mark.parametrize("times", [0, 1, 2])
def test_round_trip(times: int, tmp_path) -> None:
    model = pruned(times)
    fxslim.save(model, tmp_path / "m.safetensors", extras={"epoch": 3})
    loaded = fxslim.load(RandomNetwork(5), tmp_path / "m.safetensors")
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert [p.to_dict() for p in fxslim.applied(loaded)] == [p.to_dict() for p in fxslim.applied(model)]
    assert fxslim.read_extras(tmp_path / "m.safetensors") == {"epoch": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_constants_that_masks_left_are_in_the_weights(tmp_path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3))

    model = build()
    plan = fxslim.PruningPlan.from_masks(model, X, {"0.weight": torch.tensor([1, 0] * 4)})
    assert plan.folds
    fxslim.save(plan.apply(model), tmp_path / "m")
    fresh = build()
    # Constants of other weights can't be folded, and need not be: the values are in the file.
    nn.init.constant_(fresh[0].bias, torch.nan)
    loaded = fxslim.load(fresh, tmp_path / "m")
    assert torch.equal(loaded(X), model(X))
    assert fxslim.applied(loaded)[0].to_dict() == plan.to_dict()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.b.weight = self.a.weight
        self.register_buffer("plain", torch.arange(6.0), persistent=False)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(x))) + self.plain)


def test_tied_weights_and_buffers_that_are_not_saved(tmp_path) -> None:
    model = Tied()
    fxslim.save(model, tmp_path / "m")
    loaded = fxslim.load(Tied(), tmp_path / "m")
    assert loaded.a.weight is loaded.b.weight
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), model(x))


def test_training_resumes_exactly(tmp_path) -> None:
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            model.train()(X).square().mean().backward()
            optimizer.step()

    model = pruned()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    steps(model, optimizer, 3)
    fxslim.save(model, tmp_path / "m", optimizer=optimizer)
    steps(model, optimizer, 3)
    fresh = RandomNetwork(5)
    resumed = torch.optim.Adam(fresh.parameters(), 0.5)
    fxslim.load(fresh, tmp_path / "m", optimizer=resumed)
    steps(fresh, resumed, 3)
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    other = RandomNetwork(5)
    with pytest.raises(CheckpointError, match="the state of Adam, not of SGD"):
        fxslim.load(other, tmp_path / "m", optimizer=torch.optim.SGD(other.parameters(), 0.1))


def test_wrong_files_change_nothing(tmp_path) -> None:
    fxslim.save(pruned(), tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "short").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    fxslim.save(nn.Linear(2, 2), tmp_path / "other")
    cases = {
        "short": "can't be read",
        "text": "can't be read",
        "foreign": "is no file of fxslim.save",
        "none": "can't be read",
    }
    for name, message in {**cases, "other": "does not fit this model: it lacks"}.items():
        model = RandomNetwork(5)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            fxslim.load(model, tmp_path / name)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        assert fxslim.applied(model) == []


def test_a_failure_after_the_plans_undoes_them(tmp_path) -> None:
    fxslim.save(pruned(), tmp_path / "m")
    model = RandomNetwork(5)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="saved without an optimizer"):
        fxslim.load(model, tmp_path / "m", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert fxslim.applied(model) == []


def test_what_can_not_be_saved_is_said(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="extras can't be written as JSON"):
        fxslim.save(nn.Linear(2, 2), tmp_path / "m", extras=object())
    fxslim.save(pruned(), tmp_path / "m")
    with pytest.raises(CheckpointError, match="1 plans are applied"):
        fxslim.load(pruned(), tmp_path / "m")
