# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, cut short, foreign or in the wrong place: a clear error, and nothing is changed."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fxslim
from fxslim import CheckpointError, FxslimError, PlanError
from fxslim.plan.file_writing import write_file
from tests.pruning.small_models import X, assert_unchanged, small, snapshot


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with the state of an optimizer, and its plan."""
    folder = tmp_path_factory.mktemp("saved")
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    fxslim.prune(model, X, optimizer=optimizer)
    model(X).sum().backward()
    optimizer.step()
    fxslim.save(model, folder / "model", optimizer=optimizer, extras={"epoch": 1})
    fxslim.applied(model)[0].save(folder / "plan")
    return folder


def refused(path: Path, message: str = "") -> None:
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)
    with pytest.raises(FxslimError, match=message):
        fxslim.load(model, path, optimizer=optimizer)
    assert_unchanged(before, snapshot(model, optimizer))


def rewritten(path: Path, to: Path, **changes: Any) -> Path:
    """The same file with other metadata; None takes an entry away."""
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    save_file(tensors, to, metadata={k: v for k, v in metadata.items() if v != "null"})
    return to


def test_every_length_is_refused(saved: Path, tmp_path: Path) -> None:
    data = (saved / "model").read_bytes()
    for length in {0, 1, 7, 8, 9, 100, *random.Random(0).sample(range(len(data)), 40), len(data) - 1}:
        (tmp_path / "short").write_bytes(data[:length])
        refused(tmp_path / "short", "can't be read: .*short|short can't be read")
    (tmp_path / "long").write_bytes(data + b"more")
    refused(tmp_path / "long", "can't be read")


def test_flipped_bytes_of_the_header_are_an_error_or_harmless(saved: Path, tmp_path: Path) -> None:
    data = bytearray((saved / "model").read_bytes())
    length = int.from_bytes(data[:8], "little") + 8
    choose = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        damaged[choose.randrange(length)] = choose.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        model = small()
        before = snapshot(model)
        try:
            fxslim.load(model, tmp_path / "damaged", optimizer=torch.optim.Adam(model.parameters()))
        except FxslimError:
            assert_unchanged(before, snapshot(model))
        else:
            assert model(X).shape == (2, 5)


def test_other_files_and_places(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    torch.save(small().state_dict(), tmp_path / "pickle")
    save_file(small().state_dict(), tmp_path / "foreign")
    (tmp_path / "text").write_text("hello, this is not a file of weights")
    for name in ("empty", "folder", "pickle", "text", "missing"):
        refused(tmp_path / name, f"{name} can't be read: .*fxslim.save")
        with pytest.raises(CheckpointError, match=f"{name} can't be read as a plan"):
            fxslim.load_plan(tmp_path / name)
        with pytest.raises(CheckpointError, match="can't be read"):
            fxslim.read_extras(tmp_path / name)
    refused(tmp_path / "foreign", "is no file of fxslim.save.*load_state_dict")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"plans": None}, "'plans' is None, expected a list"),
        ({"plans": {}}, "'plans' is {}, expected a list"),
        ({"plans": "[{]"}, "can't be read: JSONDecodeError"),
        ({"plans": [1]}, "no plan of fxslim"),
        ({"tied": None}, "'tied' is None, expected a dict"),
        ({"tied": {"0.weight": "9.weight"}}, r"tied to \['9.weight'\], which it does not have"),
        ({"optimizer": None}, "was saved without an optimizer: load it without"),
        ({"optimizer": [1]}, "was saved without an optimizer"),
        ({"optimizer": {"kind": "SGD"}}, "the state of SGD, not of Adam: make a SGD, or load without"),
        ({"optimizer": {"kind": "Adam"}}, "optimizer's state in .* is damaged: KeyError"),
        ({"optimizer": {"kind": "Adam", "scalars": {}, "groups": []}}, "does not fit this one"),
        ({"optimizer": {"kind": "Adam", "scalars": {}, "groups": [{"params": 3}]}}, "damaged|does not fit"),
        ({"fxslim": "7"}, "format '7', expected '1'"),
    ],
)
def test_damaged_metadata(saved: Path, tmp_path: Path, changes: dict, message: str) -> None:
    refused(rewritten(saved / "model", tmp_path / "m", **changes), message)


def mutated(data: Any, choose: random.Random) -> Any:
    """The same JSON with one value taken away, repeated or replaced, at a random depth."""
    if isinstance(data, dict | list) and data and choose.random() < 0.9:
        key = choose.choice(list(data) if isinstance(data, dict) else range(len(data)))
        changed = data.copy()
        if choose.random() < 0.15:
            del changed[key]
        else:
            changed[key] = mutated(data[key], choose)
        return changed
    return choose.choice([None, -1, 10**30, 0.5, "", "x", "0-99999999999", "7,3", [], {}, True, "²"])


def test_plans_with_one_wrong_value(saved: Path, tmp_path: Path) -> None:
    data = json.loads((saved / "plan").read_text())
    choose = random.Random(0)
    for _ in range(400):
        (tmp_path / "plan").write_text(json.dumps(mutated(data, choose)))
        model = small()
        before = snapshot(model)
        try:
            fxslim.load_plan(tmp_path / "plan").apply(model)
        except FxslimError:
            assert_unchanged(before, snapshot(model))


def test_indices_outside_of_a_parameter(saved: Path, tmp_path: Path) -> None:
    data = json.loads((saved / "plan").read_text())
    cut = data["cuts"][0]
    for change, message in (
        ({3: "0-99999999999"}, "'0-99999999999' are not between 0 and 15"),
        ({3: "5-2"}, "are not between 0 and"),
        ({1: 4}, r"0\.weight of shape \(16, 3, 3, 3\) has no dim 4 in 1 blocks"),
        ({2: 5}, r"has no dim 0 in 5 blocks"),
        ({2: 2, 3: "0-7"}, r"0\.weight: 8 entries of dim 0 can't be shared by 2 blocks"),
        ({1: 1, 2: 2, 3: "0-2"}, r"3 entries of dim 1 can't be shared by 2 blocks"),
        ({1: 1, 2: 2, 3: "0-1"}, r"a block of 3 inputs keeps entries of another"),
    ):
        wrong = [change.get(i, value) for i, value in enumerate(cut)]
        (tmp_path / "plan").write_text(json.dumps({**data, "cuts": [wrong, *data["cuts"][1:]]}))
        with pytest.raises(CheckpointError, match=f"the plan is damaged: .*{message}"):
            fxslim.load_plan(tmp_path / "plan")


def test_cuts_of_parameters_that_do_not_exist(saved: Path, tmp_path: Path) -> None:
    data = json.loads((saved / "plan").read_text())
    data["cuts"][0][0] = "7.weight"
    (tmp_path / "plan").write_text(json.dumps(data))
    model = small()
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"the plan does not fit this model: it has no 7\.weight, which the plan cuts"):
        fxslim.load_plan(tmp_path / "plan").apply(model)
    assert_unchanged(before, snapshot(model))


def test_paths_that_can_not_be_written(tmp_path: Path) -> None:
    model = small()
    plan = fxslim.plan_pruning(model, X)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "m", tmp_path / "folder", tmp_path / "file" / "m"):
        for write in (lambda path=path: fxslim.save(model, path), lambda path=path: plan.save(path)):
            with pytest.raises(CheckpointError, match=re.escape(f"{path} can't be written: ")):
                write()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    with pytest.raises(CheckpointError, match="can't be written"):
        fxslim.save(model, "")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    fxslim.save(small(), path)
    before = path.read_bytes()

    def half(temporary: Path) -> None:
        temporary.write_bytes(before[:100])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, half)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_models_without_values(saved: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(CheckpointError, match=r"0\.weight is on the meta device: it has no values to save"):
        fxslim.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"is on the meta device and can't be filled: model\.to_empty"):
        fxslim.load(model, saved / "model")
    assert model[0].weight.shape == (16, 3, 3, 3)
    fxslim.load(model.to_empty(device="cpu"), saved / "model")
    assert torch.equal(model.eval()(X), fxslim.load(small(), saved / "model").eval()(X))


def test_wrappers_with_a_module_of_the_same_names(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))

    first, second = Wrapper(), Wrapper()
    fxslim.save(first, tmp_path / "m")
    fxslim.load(second, tmp_path / "m")
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_load_that_fails_late_takes_everything_back(saved: Path, tmp_path: Path) -> None:
    groups = [{"params": [0, 1], "lr": 0.1}, {"params": list(range(2, 9)), "lr": 0.1}]
    path = rewritten(saved / "model", tmp_path / "m", optimizer={"kind": "Adam", "scalars": {}, "groups": groups})
    refused(path, "the saved optimizer does not fit this one")
