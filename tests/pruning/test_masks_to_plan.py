# SPDX-License-Identifier: Apache-2.0
"""PruningPlan.from_masks: the outputs stay those of the masked model, constants are folded or their channel stays."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim import ConfigError, PlanError, PruningPlan
from fxslim.pruning import masks_to_plan
from fxslim.pruning.weight_masks import mask_weights, masked_entries
from tests.graph.random_networks import RandomNetwork, randomise
from tests.pruning.random_masks import random_masks
from tests.pruning.small_models import assert_unchanged, snapshot

X = torch.randn(2, 3, 10, 10, dtype=torch.float64)
GONE = [1, 4, 5]
ROWS = torch.ones(8).index_fill(0, torch.tensor(GONE), 0)


def difference(model: nn.Module, masks: dict, plan: PruningPlan, inputs: list[Tensor]) -> float:
    """Between the masked model and the applied plan, relative, in eval mode; the model is pruned afterwards."""
    twin = mask_weights(copy.deepcopy(model), masks).eval()
    want = [twin(x).detach() for x in inputs]
    plan.apply(model).eval()
    pairs = [(a, model(x).detach()) for a, x in zip(want, inputs, strict=True)]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-300)) for a, b in pairs)


def test_random_networks_with_random_masks_keep_their_outputs() -> None:
    removed = folds = 0
    for seed in range(150):
        model = RandomNetwork(seed).double()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        other = torch.randn(1, 3, 11, 9, dtype=torch.float64) if model.head_kind != "flatten" else x * 2
        masks = random_masks(model, seed)
        mask_weights(model, masks)
        plan = PruningPlan.from_masks(model, x, masks)
        removed += sum(row.before - row.after for row in plan.rows)
        folds += len(plan.folds)
        assert difference(model, masks, plan, [x, other]) <= 1e-9, seed
    assert removed >= 500
    assert folds >= 10


def net(*middle: nn.Module, last: nn.Module | None = None) -> nn.Sequential:
    """A convolution with 8 channels, what follows it, and a convolution that reads them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *middle, last or nn.Conv2d(8, 4, 3))
    return randomise(model).double()


FOLDED = {
    "into the bias": lambda: net(nn.BatchNorm2d(8), nn.Sigmoid()),
    "through pooling and upsampling": lambda: net(
        nn.Sigmoid(), nn.MaxPool2d(3, 2, 1), nn.Upsample(scale_factor=1.7, mode="bilinear")
    ),
    "under reflected padding": lambda: net(last=nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")),
    "strided and dilated": lambda: net(last=nn.Conv2d(8, 4, 2, stride=2, dilation=2)),
    "into a linear layer": lambda: net(nn.Sigmoid(), nn.Flatten(), last=nn.Linear(8 * 64, 4)),
    "into a linear layer after the mean": lambda: net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last=nn.Linear(8, 4)),
    "into the running mean": lambda: nn.Sequential(
        *net(last=nn.Conv2d(8, 4, 3, bias=False)), randomise(nn.BatchNorm2d(4)).double(), nn.ReLU()
    ),
    "past an average that leaves its border out": lambda: net(nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_folded(name: str) -> None:
    model = FOLDED[name]()
    masks = {"0.weight": ROWS}
    plan = PruningPlan.from_masks(model, X, masks)
    assert plan.rows[0].after == 5
    assert len(plan.folds) == 1
    assert plan.notes == ()
    assert plan.verify(model, X).ok
    # The weights were not masked in the model: the plan does it, since these channels go as a whole.
    twin = mask_weights(copy.deepcopy(model), masks)
    naive = PruningPlan.from_dict({**plan.to_dict(), "masks": None}).apply(copy.deepcopy(model))
    assert float((naive.eval()(X) - twin.eval()(X)).detach().abs().max()) > 1e-3, "nothing to fold"
    assert difference(model, masks, plan, [X, X + 1]) <= 1e-9


class Gated(nn.Module):
    """A masked branch times a gate whose unit a bias holds closed on all likely inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        nn.init.constant_(self.gate.bias, -20.0)

    def forward(self, x):
        return self.b(self.a(x) * torch.relu(self.gate(x)))


STAYING: dict[str, tuple[Callable[[], nn.Module], dict, str]] = {
    "zero padding": (
        lambda: net(last=nn.Conv2d(8, 4, 3, padding=1)), {"0.weight": ROWS},
        "0: 3 masked channels stay: 1 reads constants of them, with zero padding around",
    ),
    "transposed": (
        lambda: net(last=nn.ConvTranspose2d(8, 4, 3)), {"0.weight": ROWS}, "1 reads constants of them, with zero",
    ),
    "no bias": (
        lambda: net(last=nn.Conv2d(8, 4, 3, bias=False)), {"0.weight": ROWS}, "no bias or batch norm of its own",
    ),
    "padded pixels": (lambda: net(nn.ZeroPad2d(1)), {"0.weight": ROWS}, "2 reads values of them that are not constant"),
    "depthwise, then the mean": (
        lambda: net(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.AdaptiveAvgPool2d(1), last=nn.Conv2d(8, 4, 1)),
        {"0.weight": ROWS}, "3 reads values of them that are not constant",
    ),
    "group norm": (lambda: net(nn.GroupNorm(1, 8)), {"0": ROWS}, "a norm averages over its channels"),
    "model output": (lambda: net(), {"1": torch.tensor([1, 0, 1, 1])}, "1: 1 masked channels stay: model output"),
    "everything": (lambda: net(), {"0": torch.zeros(8)}, "0: 1 masked channels stay: one must stay"),
    "a closed gate": (lambda: Gated().double(), {"a.weight": ROWS}, "b reads values of them that are not constant"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_is_said(name: str) -> None:
    make, masks, message = STAYING[name]
    model = make()
    mask_weights(model, masks)
    plan = PruningPlan.from_masks(model, X, masks)
    assert message in "\n".join(plan.notes)
    assert message in str(plan)
    assert difference(model, masks, plan, [X, X[:1]]) <= 1e-9


class Residual(nn.Module):
    """Channels that two convolutions make together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.c(torch.relu(self.a(x) + self.b(x)))


def test_every_layer_of_a_group_must_be_masked() -> None:
    for masks, kept in (({"a": ROWS, "b": torch.ones(8)}, 8), ({"a": ROWS, "b": ROWS.roll(1)}, 7)):
        model = mask_weights(Residual().double(), masks)
        plan = PruningPlan.from_masks(model, X, masks)
        stay = 3 - (8 - kept)
        assert plan.rows[0].after == kept
        assert f"a: {stay} masked channels stay: c reads values of them that are not constant" in plan.notes
        assert difference(model, masks, plan, [X]) <= 1e-9


def test_groups_fold_each_their_own() -> None:
    rows = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0])
    model = net(nn.Sigmoid(), last=nn.Conv2d(8, 6, 3, groups=2))
    plan = PruningPlan.from_masks(model, X, {"0.weight": rows})
    assert (plan.rows[0].after, len(plan.folds)) == (4, 1)
    assert difference(model, {"0.weight": rows}, plan, [X]) <= 1e-9
    # Unequal counts: one of the three stays.
    model = mask_weights(net(nn.Sigmoid(), last=nn.Conv2d(8, 6, 3, groups=2)), {"0.weight": ROWS})
    plan = PruningPlan.from_masks(model, X, {"0.weight": ROWS})
    assert plan.rows[0].after == 6
    assert "0: 1 masked channels stay: one must stay, and parts of equal size" in plan.notes[0]


def test_columns_that_nothing_reads() -> None:
    model = net(nn.Sigmoid(), last=nn.Conv2d(8, 4, 3, padding=1))
    masks = {"2": ROWS.view(1, 8, 1, 1).expand(4, 8, 3, 3)}
    plan = PruningPlan.from_masks(model, X, masks)
    assert (plan.rows[0].after, plan.folds) == (5, ())
    assert difference(model, masks, plan, [X]) <= 1e-12


def test_batch_norm_scales_alone() -> None:
    """Slimming masks scales: the shift is left, a constant."""
    model = net(nn.BatchNorm2d(8), nn.ReLU())
    plan = PruningPlan.from_masks(model, X, {"1": ROWS})
    assert plan.rows[0].after == 5
    assert difference(model, {"1": ROWS}, plan, [X]) <= 1e-9


def test_values_are_those_at_apply_time(tmp_path) -> None:
    model = net(nn.Sigmoid())
    PruningPlan.from_masks(model, X, {"0.weight": ROWS}).save(tmp_path / "plan.json")
    plan = fxslim.load_plan(tmp_path / "plan.json")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.3)
    assert difference(model, {"0.weight": ROWS}, plan, [X]) <= 1e-9
    text = json.loads((tmp_path / "plan.json").read_text())
    text["masks"]["inputs"] = None
    with pytest.raises(PlanError, match=r"has no example inputs.*values=False"):
        PruningPlan.from_dict(text).apply(net(nn.Sigmoid()))


def test_constants_that_can_not_be_folded_at_apply_time_change_nothing() -> None:
    model = net(nn.ReLU(), last=nn.Conv2d(8, 4, 3, padding=1))
    with torch.no_grad():
        model[0].bias.fill_(-1.0)
    plan = PruningPlan.from_masks(model, X, {"0.weight": ROWS})
    assert plan.rows[0].after == 5
    with torch.no_grad():
        model[0].bias.fill_(2.0)
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"2\.weight reads 3 removed channels that are constant but not 0, up to 2,"):
        plan.apply(model)
    assert_unchanged(before, snapshot(model))
    model = net(nn.Sigmoid())
    plan = PruningPlan.from_masks(model, X, {"0.weight": ROWS})
    model[2].padding = (1, 1)
    with pytest.raises(PlanError, match=r"2\.weight reads 3 removed channels that are constant but not 0"):
        plan.apply(model)
    model = net(nn.BatchNorm2d(8), nn.Sigmoid())
    plan = PruningPlan.from_masks(model, X, {"1": ROWS, "1.bias": ROWS})
    with torch.no_grad():
        model[1].running_var.fill_(torch.nan)
    with pytest.raises(PlanError, match=r"3\.weight reads 3 removed channels that are not constant"):
        plan.apply(model)


class TwoReaders(nn.Module):
    """A result that a batch norm reads, and something else; and a bias that two layers add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.d, self.e = nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 3)
        self.e.bias = self.d.bias

    def forward(self, x):
        h = torch.sigmoid(self.a(x))
        b = self.b(h)
        return self.norm(b) + b, self.d(torch.tanh(h)) + self.e(h)


@pytest.mark.parametrize("reader", ["b", "d", "e"])
def test_what_others_use_takes_no_constants(reader: str) -> None:
    model = randomise(TwoReaders()).double()
    for name in {"b", "d", "e"} - {reader}:
        # These do not read the masked channels.
        mask_weights(model, {name: ROWS.view(1, 8, 1, 1).expand(4, 8, 3, 3)})
    mask_weights(model, {"a.weight": ROWS})
    plan = PruningPlan.from_masks(model, X, {"a.weight": ROWS})
    assert plan.cuts == ()
    why = f"{reader} reads constants of them, with no bias or batch norm of its own to take them"
    assert plan.notes == (f"a: 3 masked channels stay: {why}",)


def test_a_plan_that_would_change_outputs_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_to_plan, "_averaged_over", lambda recordings: set())
    with pytest.raises(PlanError, match="would change the model's outputs, so it is not made: NOT equal"):
        PruningPlan.from_masks(net(nn.GroupNorm(1, 8)), X, {"0": ROWS, "1": ROWS, "1.bias": ROWS})


def test_structure_alone_leaves_values_to_a_state_dict() -> None:
    make = FOLDED["into the bias"]
    plan = PruningPlan.from_masks(make(), X, {"0.weight": ROWS})
    whole, shapes = plan.apply(make()), plan.apply(make(), values=False)
    assert not torch.equal(whole[3].bias, shapes[3].bias)
    assert torch.equal(shapes[3].bias, make()[3].bias)
    shapes.load_state_dict(whole.state_dict())
    assert torch.equal(shapes.eval()(X), whole.eval()(X))


def test_masked_for_training_first() -> None:
    make = FOLDED["into the bias"]
    plan = PruningPlan.from_masks(make(), X, {"0.weight": ROWS})
    want, model = plan.apply(make()).eval()(X), make()
    plan.mask(model)
    torch.testing.assert_close(model.eval()(X), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plan.apply(model).eval()(X), want, rtol=1e-12, atol=1e-12)


def test_under_a_compile_wrapper() -> None:
    make = FOLDED["into the bias"]
    plan, model = PruningPlan.from_masks(make(), X, {"0.weight": ROWS}), make()
    plan.apply(torch.compile(model, backend="eager"))
    torch.testing.assert_close(model.eval()(X), plan.apply(make()).eval()(X), rtol=1e-12, atol=1e-12)


def test_in_single_precision() -> None:
    model = net(nn.BatchNorm2d(8), nn.Sigmoid()).float()
    masks = {"0.weight": ROWS}
    plan = PruningPlan.from_masks(model, X.float(), masks)
    assert difference(model, masks, plan, [X.float()]) <= 1e-5
    assert model[3].bias.dtype == torch.float32


def test_forms_of_masks() -> None:
    layer = nn.Sequential(nn.Linear(2, 3), nn.ConvTranspose2d(3, 2, 1))
    row = torch.tensor([True, False, True])
    for masks, names in (
        ({"0": row}, {"0.weight", "0.bias"}),
        ({"0.weight": row}, {"0.weight"}),
        ({"0": {"weight": row, "bias": None}}, {"0.weight"}),
        ({"0": {"weight": row, "bias": row}}, {"0.weight", "0.bias"}),
        ({"0": row, "0.bias": torch.ones(3)}, {"0.weight", "0.bias"}),
    ):
        found = masked_entries(layer, masks)
        assert found.keys() == names
        assert found["0.weight"].tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert masked_entries(layer, {"1": torch.tensor([0, 1])})["1.weight"][:, 0].all()


@pytest.mark.parametrize(
    "masks, error, message",
    [
        ({"conv": torch.ones(8)}, ConfigError, "masks: unknown layer or parameter 'conv'"),
        ({"0": {"wieght": torch.ones(8)}}, ConfigError, "unknown parameter '0.wieght'; did you mean '0.weight'"),
        ({"0": torch.ones(7)}, ConfigError, r"0.weight has shape \(8, 3, 3, 3\), its mask \(7,\) nor of its 8 output"),
        ({"0.bias": torch.ones(7)}, ConfigError, r"0.bias has shape \(8,\), its mask \(7,\)"),
        ({"0": torch.full((8,), 0.5)}, ConfigError, "0.weight has 8 values that are neither 0 nor 1"),
        ({"0": torch.eye(8)[:, :3, None, None].expand(8, 3, 3, 3)}, PlanError,
         r"0.weight: 54 weights in channels that stay are masked, but not 0 in this model.*mask_weights"),
    ],
)  # fmt: skip
def test_bad_masks(masks: dict, error: type, message: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        PruningPlan.from_masks(model, X, masks)
    assert_unchanged(before, snapshot(model))
