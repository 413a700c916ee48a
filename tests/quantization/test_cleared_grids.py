# SPDX-License-Identifier: Apache-2.0
"""Of what is computed from integers nothing lies halfway between two steps of the next grid."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxslim
from fxslim.nn.quantizers.observed import StaticActivations
from fxslim.quantization import cleared_grids
from fxslim.quantization.cleared_grids import _clearance, _rescale
from fxslim.quantization.quantization_plan import QuantizationPlan

IMAGE = (2, 3, 8, 8)
# The least of what is tried, and what rounding a scale takes of it.
CLEAR = 0.7e-5


def _quantizer(low: float, high: float) -> StaticActivations:
    quantizer = StaticActivations(fxslim.nn.ActivationQuant(method="static"))
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    return quantizer


def _grid(quantizer: Any) -> tuple[float, int, int]:
    scale, zero_point = (one.item() for one in quantizer.grid())
    return scale, *(int(end - zero_point) for end in quantizer.config.grid)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.booleans())
def test_any_sum_of_two(seed: int, above: bool) -> None:
    """All pairs of integers; in float32, in any order, each falls to the side where real numbers put it."""
    torch.manual_seed(seed)
    one, two = (torch.arange(256) - torch.randint(0, 256, (1,)) for _ in range(2))
    a, b = torch.rand(2, 1) * 0.1 + 1e-3
    exact = (one[:, None].double() * a + two.double() * b).reshape(-1)
    ends = exact.amin().item() * 0.7, exact.amax().item() * 0.8
    quantizer = _quantizer(0.0 if above or ends[0] >= 0 else ends[0], max(ends[1], 1e-2))
    before = _grid(quantizer)
    _rescale(quantizer, exact.numpy())
    scale, least, most = _grid(quantizer)
    assert (least, most) == before[1:]
    assert abs(scale / before[0] - 1) <= 5.1e-4
    steps = (exact / scale).clamp(least, most).round()
    in_float = ((one[:, None] * a + two * b).reshape(-1) / torch.tensor(scale)).clamp(least, most).round()
    folded = ((one[:, None] * (a / scale) + two * (b / scale)).reshape(-1)).clamp(least, most).round()
    assert torch.equal(in_float.double(), steps)
    assert torch.equal(folded.double(), steps)


def test_what_is_clear_stays() -> None:
    quantizer = _quantizer(-1.0, 2.0)
    scale = quantizer.scale.clone()
    _rescale(quantizer, np.arange(-80, 170) * scale.item())
    assert torch.equal(quantizer.scale, scale)


def test_what_no_range_clears_stays() -> None:
    quantizer = _quantizer(-1.0, 2.0)
    scale = quantizer.scale.clone()
    _rescale(quantizer, np.random.default_rng(0).uniform(-1.0, 2.0, 2_000_000))
    assert torch.equal(quantizer.scale, scale)


class Net(nn.Module):
    """A function of two layers' outputs, read by a third."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.joined = Joined(name)
        self.last = nn.Conv2d(6 if name == "joined" else 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.joined(self.a(x), self.b(x)))


class Joined(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return {
            "sum": lambda: (x + y).relu_(),
            "difference": lambda: torch.sub(x, y, alpha=2),
            "product": lambda: x * y.mean((2, 3), keepdim=True),
            "gate": lambda: x * torch.sigmoid(y),
            "average": lambda: nn.functional.adaptive_avg_pool2d(x + y, 2),
            "turned": lambda: (x + y.transpose(2, 3)).relu(),
            "joined": lambda: torch.cat([x + y, y], 1),
        }[self.name]()


def _observed(model: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    """What quantizers read that is not a layer's own sum."""
    read: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, StaticActivations):

            def note(quantizer: nn.Module, args: Any, name: str = name) -> None:
                read[name] = args[0].detach().double().numpy().reshape(-1)

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(x)
    return read


@pytest.mark.parametrize("name", ["sum", "difference", "product", "gate", "average", "turned", "joined"])
@pytest.mark.parametrize("seed", range(3))
def test_networks(name: str, seed: int) -> None:
    """Values that come up in other data than that of calibration lie clear of middles too."""
    torch.manual_seed(seed)
    x = torch.randn(IMAGE)
    model = fxslim.quantize(Net(name).eval(), data=[x], example_inputs=x, target="onnxruntime")
    readers = [one for one in ("joined.output_quantizer", "last.input_quantizer") if one in dict(model.named_modules())]
    assert readers
    values = np.concatenate([_observed(model, torch.randn(64, *IMAGE[1:]) * 2)[reader] for reader in readers])
    scale, least, most = _grid(model.get_submodule(readers[0]))
    # Values were computed in float32.
    assert _clearance(values / scale, least, most) > CLEAR / 2


def test_without_it_some_lie_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleared_grids, "_rescale", lambda quantizer, values: None)
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = fxslim.quantize(Net("sum").eval(), data=[x], example_inputs=x, target="onnxruntime")
    values = _observed(model, torch.randn(256, *IMAGE[1:]) * 2)["last.input_quantizer"]
    assert _clearance(values / _grid(model.last.input_quantizer)[0], *_grid(model.last.input_quantizer)[1:]) < CLEAR / 2


def test_the_same_again() -> None:
    """Calibrating twice gives the same ranges."""
    scales = []
    for _ in range(2):
        torch.manual_seed(0)
        x = torch.randn(IMAGE)
        model = fxslim.quantize(Net("gate").eval(), data=[x], example_inputs=x, target="onnxruntime")
        scales.append([q.scale for q in fxslim.nn.quantizers.each_activation_quantizer(model).values()])
    assert all(map(torch.equal, *scales))


def test_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = fxslim.quantize(Net("sum").eval(), data=[x], example_inputs=x, target="onnxruntime")
    fxslim.save(model, tmp_path / "m.pt")
    assert torch.equal(fxslim.load(Net("sum").eval(), tmp_path / "m.pt")(x), model(x))


def test_examples_without_values_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are what calibration found where nothing tells what is computed."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    seen: list[int] = []
    monkeypatch.setattr(cleared_grids, "_rescale", lambda quantizer, values: seen.append(len(values)))
    fxslim.quantize(Net("sum").eval(), data=[x], forward=lambda model, batch: model(batch))
    assert not seen


def test_a_model_that_became_another_one() -> None:
    """It has changed since the example forward was planned with: ranges are what calibration finds."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    config = fxslim.nn.QuantConfig(activation=fxslim.nn.ActivationQuant(method="static"))
    model = fxslim.prepare_qat(Net("sum").eval(), config, example_inputs=x, target="onnxruntime").double()
    with fxslim.calibrating(model):
        model(x.double())
    assert model(x.double()).isfinite().all()


def test_ranges_found_under_inference_mode() -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    net = Net("sum").eval()
    with torch.inference_mode():
        model = fxslim.quantize(net, data=[x], example_inputs=x, target="onnxruntime")
    assert not any(buffer.is_inference() for buffer in model.buffers())


def test_calibrating_a_part_of_a_larger_model() -> None:
    scales = []
    for wrap in (lambda model: model, nn.Sequential):
        torch.manual_seed(0)
        x = torch.randn(IMAGE)
        config = fxslim.nn.QuantConfig(activation=fxslim.nn.ActivationQuant(method="static"))
        model = fxslim.prepare_qat(Net("sum").eval(), config, example_inputs=x, target="onnxruntime")
        with fxslim.calibrating(wrap(model)):
            model(x)
        scales.append(model.last.input_quantizer.scale)
    assert torch.equal(*scales)


def test_the_plan_is_what_it_was() -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    plan = fxslim.plan_quantization(Net("joined").eval(), example_inputs=x)
    assert isinstance(plan, QuantizationPlan)
    assert QuantizationPlan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()
