# SPDX-License-Identifier: Apache-2.0
"""Tables hold every value that a forward can give."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxslim.graph.inputs import Inputs
from fxslim.graph.recording import record
from fxslim.quantization.dataflow import Dataflow
from fxslim.quantization.value_tables import Levels, ValueTables

SHAPE = (2, 4, 6, 6)
FIRST, SECOND = Levels(0.5, -3, 4), Levels(0.125, 0, 7)


OPERATORS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: torch.sub(a, b, alpha=0.5),
    lambda a, b: a * b,
    lambda a, b: a.sigmoid(),
    lambda a, b: a.transpose(2, 3),
    lambda a, b: nn.functional.leaky_relu(a, 0.1),
    lambda a, b: a.clamp(-0.7, 1.1),
    lambda a, b: a.flip(1).contiguous(),
    lambda a, b: 1 - a,
]


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.factor = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y)


def _tables(function: Callable[..., Tensor]) -> tuple[list[Tensor], Callable[[], Tensor]]:
    model = Function(function)

    def drawn(levels: Levels) -> Tensor:
        return torch.randint(levels.least, levels.most + 1, SHAPE) * levels.scale

    recording = record(model, Inputs(drawn(FIRST), drawn(SECOND)))
    x, y = (node for node in recording.nodes if node.op == "placeholder")
    tables = ValueTables(Dataflow(recording), {x: FIRST, y: SECOND})
    return tables.of(recording.outputs[0]), lambda: model(drawn(FIRST), drawn(SECOND))


@torch.library.custom_op("fxslim_tests::gelu", mutates_args=())
def own_gelu(x: Tensor) -> Tensor:
    """Named as torch's, and only for float32."""
    assert x.dtype == torch.float32
    return x - x.mean()


def _written(x: Tensor) -> Tensor:
    x[:, 0] = 0.1234
    return x


def _halved(x: Tensor) -> Tensor:
    view = x.view(2, -1)
    x.mul_(0.5)
    return view


COMPUTED: dict[str, tuple[Callable[..., Tensor], list[int]]] = {
    "sum": (lambda x, y: x + y, [64]),
    "to one's place": (lambda x, y: x.add_(y, alpha=-2).relu_(), [64]),
    "one alone": (lambda x, y: nn.functional.hardswish(x * 2 + 1), [8]),
    "itself": (lambda x, y: x * torch.sigmoid(x), [8]),
    "itself elsewhere": (lambda x, y: x * torch.sigmoid(x.transpose(2, 3)), [64]),
    "the second one first": (lambda x, y: y.sigmoid() * (x + y), [64]),
    "tanh": (lambda x, y: nn.functional.gelu(x, approximate="tanh") / y.add(1), [64]),
    "average": (lambda x, y: x.mean((2, 3)), [36 * 7 + 1]),
    "pooled": (lambda x, y: nn.functional.adaptive_avg_pool2d(x, 3) - y[:, :, :3, :3], [29 * 8]),
    "windows": (lambda x, y: nn.functional.avg_pool2d(x, 3, 1, 1).relu(), [64]),
    "long windows": (lambda x, y: nn.functional.avg_pool1d(x.flatten(2), 4), [29]),
    "all of them": (lambda x, y: x.max(dim=1, keepdim=True).values * 0 + y, []),
    "moved": (lambda x, y: (x.flatten(2) + y.flatten(2)).unflatten(2, (6, 6))[:, 1:3].permute(0, 2, 3, 1), [64]),
    "joined": (lambda x, y: torch.cat([x + y, y, x], 1).clamp(max=1.5), [64, 8, 8]),
    "joined twice": (lambda x, y: torch.cat([torch.cat([x, y], 1), x], 1), [8, 8, 8]),
}
# Of which nothing is told, or not all.
UNTOLD: dict[str, Callable[..., Tensor]] = {
    "product": lambda x, y: x @ y,
    "softmax": lambda x, y: x.softmax(-1),
    "uneven": lambda x, y: nn.functional.adaptive_avg_pool2d(x, 4),
    "windows at the edge": lambda x, y: nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "windows cut off": lambda x, y: nn.functional.avg_pool2d(x, 4, 4, ceil_mode=True),
    "windows of two sizes": lambda x, y: nn.functional.adaptive_avg_pool2d(x[..., :4], (4, 3)),
    "rounded": lambda x, y: torch.div(x, 0.3, rounding_mode="floor"),
    "written in part": lambda x, y: _written(x + y),
    "written under another name": lambda x, y: _halved(x + y),
    "the user's own operator": lambda x, y: own_gelu(x),
    "average of a sum": lambda x, y: (x + y).mean((2, 3)),
    "random": lambda x, y: x + torch.rand(SHAPE),
    "picked": lambda x, y: x + torch.where(y > 0.2, x, y),
    "joined and added": lambda x, y: torch.cat([x, y], 1) + torch.cat([y, x], 1),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_every_value_is_in_a_table(name: str) -> None:
    torch.manual_seed(0)
    function, sizes = COMPUTED[name]
    tables, forward = _tables(function)
    assert [len(table) for table in tables] == sizes
    if tables:
        known = torch.cat(tables)
        for _ in range(4):
            found = forward().double().reshape(-1, 1)
            assert (found - known).abs().amin(1).max() < 1e-6


@settings(max_examples=100)
@given(st.integers(0, 2**31))
def test_any_expression(seed: int) -> None:
    """Of two tensors, in any order, moved or not: what comes out is in the table, or there is none."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    steps = [
        (draw.randrange(len(OPERATORS)), draw.randrange(64), draw.randrange(64)) for _ in range(draw.randrange(1, 7))
    ]

    def function(x: Tensor, y: Tensor) -> Tensor:
        made = [x, y]
        for kind, first, second in steps:
            a, b = made[first % len(made)], made[second % len(made)]
            made.append(OPERATORS[kind](a, b))
        return made[-1]

    tables, forward = _tables(function)
    if tables:
        known = torch.cat(tables).sort().values
        found = forward().double().reshape(-1)
        place = torch.searchsorted(known, found).clamp(1, len(known) - 1) if len(known) > 1 else 0
        distance = torch.minimum((known[place] - found).abs(), (known[place - 1] - found).abs())
        assert (distance <= 1e-5 * found.abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", UNTOLD)
def test_what_can_not_be_told(name: str) -> None:
    torch.manual_seed(0)
    assert _tables(UNTOLD[name])[0] == []


def test_parameters_are_no_levels() -> None:
    model = Function(lambda x, y: x)
    model.forward = lambda x, y: x * model.factor.reshape(-1, 1, 1) + y  # type: ignore[method-assign]
    recording = record(model, Inputs(torch.ones(SHAPE), torch.ones(SHAPE)))
    x, y = [node for node in recording.nodes if node.op == "placeholder"][:2]
    assert ValueTables(Dataflow(recording), {x: FIRST, y: SECOND}).of(recording.outputs[0]) == []
