# SPDX-License-Identifier: Apache-2.0
"""Calibration: what passes unquantized, what counts, what is switched off, and that loading goes on exactly."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxslim import CalibrationError
from fxslim.nn import ActivationQuant, Conv2dQAT, LinearQAT, QuantConfig, WeightQuant
from tests.nn.quantized.quantized_layers import KINDS, seeds, weights_only

METHODS = ["ulq", "lsq", "lsq+", "pact", "static"]
methods = pytest.mark.parametrize("method", METHODS)


def inputs_only(start_step: int = 0, **settings: Any) -> QuantConfig:
    return QuantConfig(weight=None, activation=ActivationQuant(**settings), start_step=start_step)


@given(
    method=st.sampled_from(METHODS), batch_num=st.integers(1, 3), start_step=st.integers(0, 2),
    modes=st.lists(st.booleans(), min_size=1, max_size=12), seed=seeds, kind=st.sampled_from(sorted(KINDS)),
)  # fmt: skip
def test_the_first_training_batches_pass_bit_for_bit(
    method: str, batch_num: int, start_step: int, modes: list[bool], seed: int, kind: str
) -> None:
    """Then all are quantized, those in evaluation too, which never count."""
    torch.manual_seed(seed)
    cls, arguments, shape = KINDS[kind]
    config = inputs_only(start_step, method=method, batch_num=batch_num, calibration="min_max", bits=4)
    layer: Any = cls(*arguments, config=config)
    plain, seen, highest = layer.to_float(), 0, 0.0
    for training in modes:
        x = torch.randn(shape)
        same = torch.equal(layer.train(training)(x), plain(x))
        assert same == (seen < start_step + batch_num)
        assert layer.input_quantizer.is_calibrated == (seen + training >= start_step + batch_num)
        if training and start_step <= seen < start_step + batch_num:
            highest = max(highest, x.max().item())
        seen += training
    if seen >= start_step + batch_num and method in ("ulq", "lsq+", "pact"):
        assert layer.input_quantizer.clip_max.item() == pytest.approx(highest)


@pytest.mark.parametrize("method", [*METHODS, "min_max"])
@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_clips_that_are_given_need_no_batches(method: str, start_step: int) -> None:
    layer: Any = LinearQAT(4, 3, config=inputs_only(start_step, method=method, bits=3, clip_min=-1.0, clip_max=1.0))
    plain, x = layer.to_float(), torch.randn(5, 4)
    for _ in range(start_step):
        assert torch.equal(layer.eval()(x), plain(x))
        assert torch.equal(layer.train()(x), plain(x))
    assert not torch.equal(layer.eval()(x), plain(x))
    assert not any("calibration_" in name for name in layer.state_dict())


def test_weights_wait_for_the_start_step() -> None:
    config = QuantConfig(weight=WeightQuant(bits=2), activation=None, start_step=2)
    layer, x = LinearQAT(4, 3, config=config), torch.randn(5, 4)
    plain = layer.to_float()
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()
    assert [torch.equal(layer(x), plain(x)) for _ in range(4)] == [True, True, False, False]
    assert not torch.equal(layer.eval()(x), plain(x))


@methods
def test_switches(method: str) -> None:
    layer: Any = LinearQAT(4, 3, config=inputs_only(method=method, bits=3))
    quantizer, plain, x = layer.input_quantizer, layer.to_float(), torch.randn(5, 4)
    quantizer.observing = False
    layer(x)
    assert quantizer.batches_seen == 0
    quantizer.observing, quantizer.enabled = True, False
    layer(x)
    assert quantizer.batches_seen == 0
    quantizer.enabled = True
    layer(x)
    assert (quantizer.batches_seen, quantizer.is_calibrated) == (1, True)
    assert not torch.equal(layer(x), plain(x))
    quantizer.enabled = False
    assert torch.equal(layer(x), plain(x))
    again: Any = LinearQAT(4, 3, config=inputs_only(method=method, bits=3))
    again.load_state_dict(layer.state_dict())
    assert not again.input_quantizer.enabled
    assert again.input_quantizer.observing


def test_a_weight_that_is_switched_off() -> None:
    layer: Any = LinearQAT(4, 3, config=weights_only(bits=2))
    layer.weight_quantizer.enabled = False
    assert layer.computed() is layer.weight


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [*METHODS, "min_max"])
@pytest.mark.parametrize("calibration", ["ifmr", "min_max", "percentile", "moving_average"])
def test_batches_that_are_not_finite(value: float, method: str, calibration: str) -> None:
    """The layer is named, and what was seen before stays."""
    layer: Any = LinearQAT(4, 3, config=inputs_only(method=method, calibration=calibration, batch_num=2))
    layer.name_quantizers("blocks.3.fc1")
    layer(torch.randn(5, 4))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 4)
    x[1, 2] = value
    with pytest.raises(CalibrationError, match=r"the input of blocks\.3\.fc1: 1 of .* entries .*are NaN or infinite"):
        layer(x)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def trained(layer: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    outputs = []
    for x in batches:
        optimizer.zero_grad()
        y = layer(x)
        y.pow(2).mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


@given(
    method=st.sampled_from([*METHODS, "min_max"]), weights=st.sampled_from(["arq", "lsq"]), seed=seeds,
    calibration=st.sampled_from(["ifmr", "min_max", "percentile", "moving_average"]), start=st.integers(0, 2),
    stop=st.integers(0, 6),
)  # fmt: skip
def test_loading_goes_on_exactly(method: str, weights: str, seed: int, calibration: str, start: int, stop: int) -> None:
    """At any batch: before, amid and after calibration."""
    torch.manual_seed(seed)
    config = QuantConfig(
        weight=WeightQuant(bits=4, method=weights),
        activation=ActivationQuant(bits=4, method=method, calibration=calibration, batch_num=2),
        output=ActivationQuant(bits=6),
        start_step=start,
    )
    layer, batches = LinearQAT(4, 3, config=config), [torch.randn(5, 4) for _ in range(8)]
    trained(layer, batches[:stop])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    again = LinearQAT(4, 3, config=config)
    again.load_state_dict(torch.load(file, weights_only=True))
    other = pickled(copy.deepcopy(layer))
    want = trained(layer, batches[stop:])
    for copied in (again, other):
        assert all(torch.equal(a, b) for a, b in zip(trained(copied, batches[stop:]), want, strict=True))
        state = copied.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def pickled(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_states_between_float_and_quantized_layers() -> None:
    plain, layer = nn.Conv2d(4, 6, 3), Conv2dQAT(4, 6, 3, config=weights_only(method="lsq"))
    layer(torch.randn(1, 4, 5, 5))
    with torch.no_grad():
        plain.weight.mul_(100)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(layer.weight, plain.weight)
    # The learned scale was that of other weights: it starts anew.
    torch.testing.assert_close(layer.computed(), plain.weight, rtol=0, atol=0.51 * layer.scale.max().item())
    found = nn.Conv2d(4, 6, 3).load_state_dict(Conv2dQAT(4, 6, 3).state_dict(), strict=False)
    assert not found.missing_keys
    assert found.unexpected_keys
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 2))
    state = model.state_dict()
    model[0], model[2] = Conv2dQAT.from_float(model[0]), LinearQAT.from_float(model[2])
    model(torch.randn(2, 4, 3, 3))
    model.load_state_dict(state, strict=True)
    assert model[0].input_quantizer.is_calibrated


def test_states_that_lack_a_part_are_refused() -> None:
    layer = LinearQAT(4, 3)
    state = layer.state_dict()
    del state["input_quantizer.clip_max"]
    with pytest.raises(RuntimeError, match=r"input_quantizer\.clip_max"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("given", [False, True])
def test_collecting_leaves_no_trace_in_the_state(given: bool) -> None:
    clips = {"clip_min": -1.0, "clip_max": 1.0} if given else {}
    layer: Any = LinearQAT(4, 3, config=inputs_only(**clips)).eval()
    names, quantizer, x = set(layer.state_dict()), layer.input_quantizer, torch.randn(64, 4)
    quantizer.start_collecting()
    assert torch.equal(layer(x), layer.to_float()(x))
    quantizer.finish_calibration()
    assert quantizer.is_calibrated
    assert quantizer.clip_max.item() == pytest.approx(x.max().item(), rel=0.31)
    assert set(layer.state_dict()) == names
    quantizer.start_collecting()
    with pytest.raises(CalibrationError, match="the input of LinearQAT saw no data: run forwards that reach it"):
        quantizer.finish_calibration()


@pytest.mark.parametrize("weights", ["arq", "lsq"])
@pytest.mark.parametrize("method", [*METHODS, "min_max"])
def test_training_goes_on_after_inference_mode(method: str, weights: str) -> None:
    """What a forward in inference mode keeps can be written, loaded and trained later."""
    config = QuantConfig(weight=WeightQuant(method=weights), activation=ActivationQuant(method=method))
    layer, x = LinearQAT(4, 3, config=config), torch.randn(5, 4)
    with torch.inference_mode():
        for training in (False, True, True, False):
            layer.train(training)(x)
    assert not any(value.is_inference() for value in layer.state_dict().values())
    layer.load_state_dict(LinearQAT(4, 3, config=config).state_dict())
    layer.train()(x)
    layer(x).sum().backward()
    assert layer.weight.grad.any()
