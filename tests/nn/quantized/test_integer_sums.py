# SPDX-License-Identifier: Apache-2.0
"""Sums are put on the next grid in eval mode as integer kernels do it."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim.nn.quantizers.integer_sums import Channels, as_integer_kernels, joined_sums


@given(st.integers(0, 2**31), st.sampled_from([-1, -2, -3, -4]), st.sampled_from(["outputs", "one scale"]))
def test_the_formula_of_kernels(seed: int, dim: int, scales: str) -> None:
    """A whole number in float, times one factor in float32, rounded to the nearest, ties to even."""
    torch.manual_seed(seed)
    step = torch.rand(3 if scales == "outputs" else 1) * 1e-3 + 1e-6
    scale = torch.rand(1) * 0.1 + 1e-3
    sums = torch.randint(-100_000, 100_000, (3, 3, 3, 3), dtype=torch.int32)
    shaped = step.reshape(-1, *[1] * (-dim - 1))
    x = sums * shaped * (1 + torch.randn(3, 3, 3, 3) * 1e-7)
    factor = (shaped / scale).numpy()
    wanted = np.rint(sums.numpy().astype(np.float32) * factor) * scale.numpy()
    assert np.array_equal(as_integer_kernels(x, step, Channels(dim), scale).numpy(), wanted)


def test_a_middle_that_float_misses() -> None:
    """125 steps of 0.1 are 12.5 of the next; float32 says a little more."""
    step, scale = torch.tensor([0.1]), torch.tensor([1.0])
    x = torch.tensor([12.500001])
    assert x.div(scale).round().item() == 13
    assert as_integer_kernels(x, step, Channels(-1), scale).item() == 12


def test_channels_that_were_moved() -> None:
    step, scale = torch.tensor([0.25, 0.5, 2.0, 4.0]), torch.tensor([1.0])
    x = torch.full((2, 4), 2.6)
    # Of channels 1 and 2 two places each: 2.6 is 5 halves, so 2, and one step of 2.
    assert as_integer_kernels(x, step, Channels(-1, 1, 2, 2), scale).tolist() == [[2.0, 2.0, 2.0, 2.0]] * 2
    assert as_integer_kernels(x + 0.5, step, Channels(-1, 1, 2, 2), scale).tolist() == [[3.0, 3.0, 4.0, 4.0]] * 2
    # One of them is anywhere.
    assert as_integer_kernels(x[:, :3] + 0.5, step, Channels(-1, 3, 1), scale).tolist() == [[4.0] * 3] * 2


def test_ends_of_clamps_stay() -> None:
    """6 is 5.45 steps of 1.1 and of the next grid 2.4: the kernel has more steps there, which are cut off behind it."""
    x, step, scale = torch.tensor([6.0, 5.5, -6.0, -5.5]), torch.tensor([1.1]), torch.tensor([2.5])
    assert as_integer_kernels(x, step, Channels(-1), scale).tolist() == [5.0, 5.0, -5.0, -5.0]
    cut = as_integer_kernels(x, step, Channels(-1, low=-6.0, high=6.0), scale).tolist()
    assert cut == [6.0, 5.0, -6.0, -5.0]


def test_channels_in_another_order() -> None:
    x, step, scale = torch.full((1, 3), 2.6), torch.tensor([0.25, 0.5, 2.0]), torch.tensor([1.0])
    assert as_integer_kernels(x, step, Channels(-1, order=(2, 0, 1)), scale).tolist() == [[2.0, 2.0, 2.0]]
    assert as_integer_kernels(x + 0.5, step, Channels(-1, order=(2, 0, 1)), scale).tolist() == [[4.0, 3.0, 3.0]]
    assert as_integer_kernels(x, torch.rand(3), Channels(-1, order=(2, 0)), scale) is x


def test_sums_of_two_layers_side_by_side() -> None:
    x, scale = torch.tensor([[2.6, 3.1, 2.6, 3.1, 2.6]]), torch.tensor([1.0])
    parts = {
        Channels(-1, 0, 2, start=0): torch.tensor([0.25, 0.5]),
        Channels(-1, 1, 1, start=4): torch.tensor([9.0, 2.0]),
        # Not those of a tensor of this size.
        Channels(-1, 0, 2, start=4): torch.tensor([7.0, 7.0]),
    }
    ((channels, step),) = joined_sums(parts, x.shape).items()
    # Between them the grid rounds as ever.
    assert as_integer_kernels(x, step, channels, scale).tolist() == [[2.0, 3.0, 3.0, 3.0, 2.0]]


@pytest.mark.parametrize("pool", [lambda y: nn.functional.max_pool1d(y, 2), lambda y: y.flip(1).amax(1, keepdim=True)])
def test_the_largest_of_several_channels_is_nobodys(pool: Callable[[Tensor], Tensor]) -> None:
    """Which of them it was differs from place to place."""

    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(pool(self.a(x).unsqueeze(1)).squeeze(1))

    net = Largest()
    net(torch.randn(ROWS))
    assert "b" not in fxslim.plan_quantization(net, example_inputs=torch.randn(ROWS), target="tensorrt").sums


class Appended(nn.Module):
    """A loop that appends to what it has, from nothing at all."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.up, self.last = length, nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        found = torch.tensor([])
        for _ in range(self.length):
            found = torch.cat([found, h.unsqueeze(1)], 1)
            h = h * 0.9
        return self.last(found)


def test_long_loops_of_joins() -> None:
    x = torch.randn(ROWS)
    assert fxslim.quantize(Appended(400).eval(), data=[x], example_inputs=x)(x).isfinite().all()


def test_what_is_no_sum_of_the_layer_passes() -> None:
    step, scale = torch.ones(4), torch.tensor([1.0])
    for x in (torch.rand(2, 3), torch.rand(9), torch.rand(2, 4).half(), torch.rand(2, 4).bfloat16()):
        assert as_integer_kernels(x, step, Channels(-1), scale) is x
    assert as_integer_kernels(torch.rand(4), step, Channels(-3), scale).shape == (4,)


def test_steps_next_to_nothing_and_values_that_are_none() -> None:
    """Of a dead filter the sum is its bias: more steps than any number holds."""
    scale = torch.tensor([0.5])
    for least in (1e-12, 1e-40, 0.0):
        assert as_integer_kernels(torch.tensor([0.7]), torch.tensor([least]), Channels(-1), scale).item() == 0.5
    odd = as_integer_kernels(torch.tensor([torch.nan, torch.inf]), torch.ones(2), Channels(-1), scale)
    assert odd[0].isnan()
    assert odd[1] == torch.inf


def test_gradients_go_through() -> None:
    x = torch.randn(5, requires_grad=True)
    (as_integer_kernels(x, torch.tensor([1e-3]), Channels(-1), torch.tensor([0.1])) * torch.arange(5)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(5.0))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.conv(x)).relu_(), 2)
        return self.fc(torch.flatten(x, 1))


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        a, b, c = self.up(x).chunk(3, -1)
        return self.one(a), self.two(b), self.three(c * 0.3)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1).roll(1, 1))


class Parts(nn.Module):
    """The second part is no layer's, and the last one is joined along another dim than its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(11, 4, 1)
        self.d = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        last = self.d(x).transpose(1, 2)[:, :2]
        return self.c(torch.cat([self.a(x), x, self.b(x).clamp(max=5.0), last], -3))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
        self.c = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.cat([self.a(x), x[:, :1], self.d(x)], 1)
        return self.c(torch.cat([x, inner, self.b(x).clamp(max=5.0)], 1))


class CutOff(Joined):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norms = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norms(self.conv(x)))


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(x).clamp(max=0.75).clamp_(min=-0.5))


class Picked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x)[:, 3:4])


class ComputedEnds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.fc = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(x).clamp(x.min(), x.max()))


IMAGE, ROWS = (2, 3, 8, 8), (2, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "pooled": (Pooled, IMAGE, {"fc": [("conv", (-1, 0, 4, 9))]}),
    "patches": (Patches, IMAGE, {"fc": [("conv", (-1, 0, 4))]}),
    "joined": (Joined, IMAGE, {}),
    "parts": (Parts, IMAGE, {"c": [("a", (-3, 0, 4, 1, None, None, 0)), ("b", (-3, 0, 2, 1, None, 5.0, 7))]}),
    "parts of a part": (
        Nested, IMAGE,
        {"c": [("a", (-3, 0, 2, 1, None, None, 3)), ("d", (-3, 0, 4, 1, None, None, 6)),
               ("b", (-3, 0, 2, 1, None, 5.0, 10))]},
    ),
    # Joined and cut off, each part was on a grid before.
    "joined, then cut off": (CutOff, IMAGE, {"a": [], "b": [], "c": []}),
    "shuffled": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ChannelShuffle(2), nn.Conv2d(4, 2, 1)), IMAGE,
        {"2": [("0", (-3, 0, None, 1, None, None, None, (0, 2, 1, 3)))]},
    ),
    "two norms": (TwoNorms, IMAGE, {}),
    "layers": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), ROWS, {"2": [("0", (-1, 0, 6))]}),
    "up to 6": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU6(), nn.Linear(6, 3)), ROWS,
        {"2": [("0", (-1, 0, 6, 1, None, 6.0))]},
    ),
    "two ends": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Hardtanh(), nn.Hardtanh(-3, 0.5), nn.Linear(6, 3)), ROWS,
        # The first one's result is on a grid.
        {"1": [("0", (-1, 0, 6, 1, -1.0, 1.0))], "3": []},
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), IMAGE,
        {"3": [("0", (-1, 0, 4, 36))]},
    ),
    "one channel": (Picked, IMAGE, {"last": [("conv", (-1, 3, 1))]}),
    "computed ends": (ComputedEnds, ROWS, {}),
    "clamped": (Clamped, ROWS, {"fc": [("up", (-1, 0, 6, 1, -0.5, 0.75))]}),
    "another activation": (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)), ROWS, {}),
    "video": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.Conv3d(4, 4, 1)),
        (2, 3, 4, 4, 4), {"2": [("0", (-4, 0, 4))]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whose_sums_are_read(name: str) -> None:
    make, shape, wanted = CASES[name]
    plan = fxslim.plan_quantization(make().eval(), "int8", example_inputs=torch.randn(shape))
    found = {reader: given for reader, given in plan.sums.items() if reader in wanted}
    assert found == {
        reader: tuple((layer, Channels(*at)) for layer, at in parts) for reader, parts in wanted.items() if parts
    }
    own = {reader for reader in plan.sums if reader not in wanted}
    assert not own & {"fc", "c", "last", "2", "3"}


def test_parts_of_a_sum_know_their_channels() -> None:
    plan = fxslim.plan_quantization(Halves().eval(), "int8", example_inputs=torch.randn(ROWS), target="tensorrt")
    quantized_where_made = {one.name for one in plan.layers if one.is_given}
    assert quantized_where_made | set(plan.sums) >= {"one", "two"}
    assert "three" not in plan.sums


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(name: str) -> None:
    """Whatever is expected in a forward is taken in it; and results are on the grid that a plain quantizer has."""
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = fxslim.quantize(make().eval(), "int8", data=[x], example_inputs=x)
    first = model(x)
    quantizers = [m for m in model.modules() if isinstance(m, fxslim.nn.quantizers.ActivationQuantizer)]
    assert not any(quantizer._sums for quantizer in quantizers)
    assert torch.equal(model(x), first)
    for quantizer in quantizers:
        quantizer.register_forward_pre_hook(lambda quantizer, args: quantizer.forget_sums())
    torch.testing.assert_close(model(x), first, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_plan_knows_the_readers(name: str) -> None:
    make, shape, _ = CASES[name]
    plan = fxslim.plan_quantization(make().eval(), "int8", example_inputs=torch.randn(shape))
    assert type(plan).from_dict(json.loads(json.dumps(plan.to_dict()))).sums == plan.sums


def test_other_sizes_than_the_examples() -> None:
    """One channel has one step, wherever it is in a larger image."""
    torch.manual_seed(0)
    net, x = Picked(), torch.randn(IMAGE)
    with torch.no_grad():
        net.conv.weight[4].mul_(3000)
    model = fxslim.quantize(net.eval(), "int8", data=[x], example_inputs=x)
    larger = torch.cat([x, x], -1)
    torch.testing.assert_close(model(larger), torch.cat([model(x), model(x)], -1))


def test_a_norm_in_training_mode_says_nothing_of_the_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = fxslim.quantize(Pooled().eval(), "int8", data=[x], example_inputs=x)
    model.conv(x)
    assert model.fc.input_quantizer._sums
    model.fc.input_quantizer.forget_sums()
    model.norm.train()
    model.conv(x)
    assert not model.fc.input_quantizer._sums


def test_training_adds_in_float() -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = fxslim.quantize(Pooled().eval(), "int8", data=[x], example_inputs=x).train()
    model(x).sum().backward()
    assert not any(m._sums for m in model.modules() if isinstance(m, fxslim.nn.quantizers.ActivationQuantizer))
    assert all(parameter.grad is not None for parameter in model.parameters())
