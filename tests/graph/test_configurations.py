# SPDX-License-Identifier: Apache-2.0
"""Sizes that forwards read from objects which modules hold: each module follows by itself, the objects stay."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.graph.tagged_sizes import TaggedInt
from tests.graph.proofs import check_family, stays


@dataclasses.dataclass(frozen=True)
class Frozen:
    widths: tuple[int, ...] = (8, 12)
    heads: int = 4


class Block(nn.Module):
    """Reads its width where it needs it; the same number as in all blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x)).reshape(-1, self.config.widths[1])
        return x + self.b(hidden).reshape(x.shape)


class Net(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.Sequential(Block(config), Block(config))
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


CONFIGS = {
    "namespace": lambda: SimpleNamespace(widths=[8, 12], heads=4, name="net"),
    "frozen dataclass": Frozen,
}
configs = pytest.mark.parametrize("kind", CONFIGS)


@configs
def test_each_module_has_its_own_number(kind: str) -> None:
    config = CONFIGS[kind]()
    before = copy.deepcopy(vars(config))
    model = check_family(Net(config), torch.randn(2, 5, 3), prunes="blocks.0.a blocks.1.a first")
    assert vars(config) == before
    assert model.config is config
    blocks: Any = model.blocks
    assert [block.config.widths[1] for block in blocks] == [block.a.out_features for block in blocks]
    assert all(type(block.config) is type(config) and type(block.config.widths[1]) is int for block in blocks)
    assert len({id(config), *(id(block.config) for block in blocks)}) == 3


@configs
def test_the_plan_says_so_and_replays(kind: str, tmp_path) -> None:
    config, x = CONFIGS[kind](), torch.randn(2, 5, 3)
    model = Net(config)
    plan = fxslim.plan_pruning(model, x, ratio=0.5)
    assert "blocks.0.config.widths[1] becomes" in str(plan)
    plan.save(tmp_path / "plan.json")
    plan.apply(model)
    fxslim.save(model, tmp_path / "model.safetensors")
    again = fxslim.load(Net(CONFIGS[kind]()), tmp_path / "model.safetensors")
    assert torch.equal(again(x), model(x))
    fresh = fxslim.load_plan(tmp_path / "plan.json").apply(Net(config))
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    assert config == CONFIGS[kind]()


def test_a_failure_leaves_the_objects(monkeypatch) -> None:
    config, x = CONFIGS["namespace"](), torch.randn(2, 5, 3)
    model = Net(config)
    plan = fxslim.plan_pruning(model, x, ratio=0.5)

    def fails(*_: object) -> None:
        raise RuntimeError("now")

    monkeypatch.setattr("fxslim.pruning.pruning_plan.remember_plan", fails)
    with pytest.raises(RuntimeError, match="now"):
        plan.apply(model)
    assert all(module.config is config for module in (model, *model.blocks))
    assert config == CONFIGS["namespace"]()


def test_a_plan_for_another_number() -> None:
    x = torch.randn(2, 5, 3)
    plan = fxslim.plan_pruning(Net(CONFIGS["namespace"]()), x, ratio=0.5)
    with pytest.raises(fxslim.PlanError, match=r"blocks\.\d\.config\.widths\[1\] is 16, the plan was made for 12"):
        plan.apply(Net(SimpleNamespace(widths=[8, 16], heads=4)))


class Sender(nn.Module):
    """Tells another module a number, through an object that both hold."""

    def __init__(self, shared: SimpleNamespace) -> None:
        super().__init__()
        self.shared, self.layer = shared, nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.shared.seen = x.shape[1] + self.shared.more
        return self.layer(x)


class Receiver(nn.Module):
    def __init__(self, shared: SimpleNamespace) -> None:
        super().__init__()
        self.shared, self.a, self.b = shared, nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)).reshape(-1, self.shared.width)
        return self.b(x).reshape(-1, self.shared.seen - self.shared.more, 4)


def test_objects_that_forwards_write_to_are_shared() -> None:
    shared = SimpleNamespace(width=12, more=2)
    model = nn.Sequential(Sender(shared), Receiver(shared))
    stays(model, torch.randn(2, 5, 3), "1.a", "has fixed sizes")
    assert model[0].shared is model[1].shared is shared
    assert vars(shared) == {"width": 12, "more": 2}


class Uncopied:
    """Holds numbers, and refuses to be copied alone."""

    def __init__(self) -> None:
        self.widths = (8, 12)

    def __copy__(self) -> "Uncopied":
        raise TypeError("no copies")


class Callable:
    def __init__(self) -> None:
        self.widths = (8, 12)

    def __call__(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("kind", [Uncopied, Callable])
def test_numbers_in_other_objects_are_written_down(kind: type) -> None:
    held = kind()
    stays(Net(held), torch.randn(2, 5, 3), "blocks.0.a", "has fixed sizes")
    assert not any(isinstance(width, TaggedInt) for width in held.widths)
