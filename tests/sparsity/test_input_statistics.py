# SPDX-License-Identifier: Apache-2.0
"""What a weight was multiplied with: a layer's outputs must follow from the sums gathered of its inputs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim import CalibrationError, ConfigError
from fxslim.batches import Data
from fxslim.patterns.weight_layout import layout_of
from fxslim.sparsity.input_statistics import Statistics, gather_statistics

CONVOLUTIONS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    rank, groups, transposed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding, kernel = draw(st.integers(0, 2)), [draw(st.integers(1, 3)) for _ in range(rank)]
    more: dict[str, Any] = {}
    if transposed:
        more["output_padding"] = draw(st.integers(0, max(stride, dilation) - 1))
    else:
        more["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "circular"]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    layer = CONVOLUTIONS[rank, transposed](
        2 * groups, 3 * groups, kernel, stride, padding, dilation=dilation, groups=groups, bias=False, **more
    )
    x = torch.randn(2, 2 * groups, *[draw(st.integers(7, 9)) for _ in range(rank)])
    return layer.double(), x.double()


def gathered(model: nn.Module, batches: list[Any], *names: str, **more: Any) -> Statistics:
    weights = {}
    for name in names:
        layer, _, attribute = name.rpartition(".")
        module = model.get_submodule(layer)
        weights[name] = module, getattr(module, attribute)
    return gather_statistics(model, Data(batches=batches), weights, **more)


@given(layers())
@settings(max_examples=60, deadline=None)
def test_squares_of_outputs_follow_from_the_sums(case: tuple[nn.Module, Tensor]) -> None:
    """Sum of y_o^2 = w_o G w_o: holds only if each row of G is what that output really read."""
    layer, x = case
    model = nn.Sequential(layer)
    y = torch.cat([model(x), model(2 * x)]).detach()
    (parts,) = gathered(model, [x, 2 * x], "0.weight").values()
    rows = layout_of(layer).rows(layer.weight.detach()).flatten(1)
    found = torch.cat([((rows[p.first : p.last] @ p.gram) * rows[p.first : p.last]).sum(1) for p in parts])
    torch.testing.assert_close(found, y.movedim(1, 0).flatten(1).square().sum(1))
    (diagonals,) = gathered(model, [x, 2 * x], "0.weight", squares_only=True).values()
    for part, short in zip(parts, diagonals, strict=True):
        torch.testing.assert_close(part.gram.diagonal(), short.gram)


class Attends(nn.Module):
    def __init__(self, kdim: int | None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.attention(query, key, key)[0]


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_hands_its_weights_to_a_function(kdim: int | None, cross: bool) -> None:
    """Queries and keys read different things: each part of the weight has sums of its own."""
    torch.manual_seed(0)
    query = torch.randn(3, 5, 8).double()
    key = torch.randn(3, 4, kdim or 8).double() if cross or kdim else query
    name = "attention." + ("in_proj_weight" if kdim is None else "k_proj_weight")
    (parts,) = gathered(Attends(kdim).double().eval(), [((query, key),)], name).values()
    assert [part.first for part in parts] == ([0] if kdim or not cross else [0, 8])
    for part in parts:
        read = query if kdim is None and part.first == 0 else key
        rows = read.reshape(-1, read.shape[-1])
        torch.testing.assert_close(part.gram, rows.t() @ rows)


def test_a_layer_used_twice_reads_both() -> None:
    layer = nn.Linear(4, 4).double()
    x = torch.randn(7, 4).double()
    (part,) = gathered(nn.Sequential(layer, nn.ReLU(), layer), [x], "0.weight")["0.weight"]
    between = layer(x).relu().detach()
    torch.testing.assert_close(part.gram, x.t() @ x + between.t() @ between)
    assert part.num == 14


@pytest.mark.parametrize(
    "data, error, words",
    [
        ([], ConfigError, "no batches"),
        ([torch.randn(2, 5)], CalibrationError, "batch 0 of data"),
        ([torch.randn(2, 4), torch.full((2, 4), torch.nan)], CalibrationError, r"0\.weight reads NaN.*batch 1"),
        ([torch.full((2, 4), 1e30)], CalibrationError, "too large to square"),
    ],
)
def test_bad_data_is_named(data: list[Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gathered(nn.Sequential(nn.Linear(4, 2)), data, "0.weight")


def test_a_layer_that_data_never_reach_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    model[1].unused = nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match=r"1\.unused\.weight \(4 outputs\): data never reached it"):
        gathered(model, [torch.randn(2, 4)], "0.weight", "1.unused.weight")
    with pytest.raises(CalibrationError, match="never reached it"):
        fxslim.sparsify(model, "2:4", method="wanda", data=[torch.randn(2, 4)])
    assert type(model[0]) is nn.Linear


USES: dict[str, Any] = {
    "weight times x": lambda weight, x: (weight @ x.t()).t(),
    "weight times batches": lambda weight, x: (weight @ x.view(2, 3, 8).mT).mT,
    "weight times a vector": lambda weight, x: torch.stack([weight @ row for row in x]),
    "some columns": lambda weight, x: nn.functional.linear(x[:, 2:6], weight[:, 2:6]),
    "some columns of some rows": lambda weight, x: torch.cat(
        [nn.functional.linear(x[:, :3], weight[:2, :3]), nn.functional.linear(x, weight[2:])], 1
    ),
    "another dtype": lambda weight, x: nn.functional.linear(x.double(), weight.double()),
}


@pytest.mark.parametrize("how", USES)
def test_products_of_every_kind(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return USES[how](self.inner.weight, x)

    model, x = Net(), torch.randn(6, 8)
    found = gathered(model, [x], "inner.weight")["inner.weight"]
    weight = model.inner.weight.detach()
    squares = torch.cat([((w := weight[p.first : p.last]) @ p.gram.to(w) * w).sum(1) for p in found])
    torch.testing.assert_close(squares, model(x).detach().reshape(6, 4).square().sum(0).float(), rtol=1e-4, atol=1e-5)


def test_autocast_multiplies_with_copies() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(6, 8)

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    plan = fxslim.plan_sparsity(model, "2:4", method="hessian", data=[x, x + 1], forward=run)
    assert all(found.ok for found in plan.check(plan.apply(model)).values())


@pytest.mark.parametrize("method", ["first_order", "par", "hessian"])
def test_planning_under_autocast(method: str) -> None:
    data = [(torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1]))]
    with torch.autocast("cpu", torch.bfloat16):
        model = fxslim.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "2:4", method=method, data=data)
    assert fxslim.patterns.check(model[0], "2:4").sparsity == 0.5


def test_sums_under_autocast_are_not_rounded() -> None:
    x = torch.randn(600, 8).bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = gathered(nn.Sequential(nn.Linear(8, 4)), [x], "0.weight")["0.weight"][0].gram
    torch.testing.assert_close(found, x.t() @ x)


def test_forwards_in_inference_mode() -> None:
    model, x = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(8, 4)), torch.randn(6, 8, 1)

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(batch)

    plan = fxslim.plan_sparsity(model, "2:4", method="par_v2", data=[x, x + 1], forward=run)
    assert all(found.ok for found in plan.check(plan.apply(model)).values())
    model(x).sum().backward()
    assert model[2].weight.grad is not None
