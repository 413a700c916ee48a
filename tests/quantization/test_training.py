# SPDX-License-Identifier: Apache-2.0
"""Training with quantizers as users train: half precision, accumulation, clipping, decay, checkpointing, averages."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxslim
from fxslim.nn import ActivationQuant, QuantConfig, WeightQuant
from fxslim.nn.quantizers import each_activation_quantizer
from fxslim.quantization import switch_quantizers
from tests.quantization.small_networks import NETWORKS, batch, batches, convolutions, step

METHODS = ("ulq", "lsq", "lsq+", "pact", "min_max", "static")
networks = pytest.mark.parametrize("network", NETWORKS)


def prepared(
    network: str, method: str = "ulq", lr: float = 0.05, bits: int = 8
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A quantized network that saw one batch, and its optimizer."""
    model = NETWORKS[network]()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    config = QuantConfig(activation=ActivationQuant(method=method, bits=bits))
    x, _ = batch()
    fxslim.prepare_qat(model, config, example_inputs=x, optimizer=optimizer)
    model.train()(x)
    return model, optimizer


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def learn(model: nn.Module, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype = torch.float32) -> list[float]:
    """Losses of Adam on one batch."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(25):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@networks
@pytest.mark.parametrize(
    ("method", "dtype"), [*((m, torch.float32) for m in METHODS), ("ulq", torch.bfloat16), ("min_max", torch.bfloat16)]
)
def test_fine_tuning_is_near_float(network: str, method: str, dtype: torch.dtype) -> None:
    """Trained in float first; then quantized with 4 bits, in full precision and under autocast."""
    model, (x, y) = NETWORKS[network](), batch(8)
    started = learn(model, x, y)[0]
    config = QuantConfig(weight=WeightQuant(bits=4), activation=ActivationQuant(method=method, bits=6))
    fxslim.prepare_qat(model, config, example_inputs=x).train()(x)
    before = states(model)
    assert not torch.allclose(model(x), switch_quantizers(model, False)(x), atol=1e-3)
    switch_quantizers(model, True)
    losses = learn(model, x, y, dtype)
    assert started > 1
    assert losses[-1] < started / 3
    assert all(quantizer.is_calibrated for quantizer in each_activation_quantizer(model).values())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert value.isfinite().all() or "calibration_" in name, name


@networks
def test_calibration_under_autocast(network: str) -> None:
    model, (x, _) = NETWORKS[network](), batch()
    fxslim.prepare_qat(model, example_inputs=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(x)
        assert model.eval()(x).isfinite().all()
    learned = 0
    for name, quantizer in each_activation_quantizer(model).items():
        assert quantizer.is_calibrated, name
        assert all(state.dtype == torch.float32 for state in quantizer.parameters()), name
        learned += len(list(quantizer.parameters()))
    assert learned > 2


def test_accumulated_gradients_are_their_sum() -> None:
    # Of 7 bits, so that all ranges are learned, and none follows the batches.
    model, _ = prepared("vit", bits=7)
    (x, y), (z, w) = batches(2)
    singly = []
    for inputs, labels in ((x, y), (z, w)):
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        singly.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    for inputs, labels in ((x, y), (z, w)):
        nn.functional.cross_entropy(model(inputs), labels).backward()
    for name, parameter in model.named_parameters():
        if name in singly[0]:
            torch.testing.assert_close(parameter.grad, singly[0][name] + singly[1][name], msg=name)
    assert any(name.endswith("clip_max") for name in singly[0])


@pytest.mark.parametrize("foreach", [False, True])
def test_clipped_gradients(foreach: bool) -> None:
    model, optimizer = prepared("convolutions")
    before = states(model)
    x, y = batch()
    (nn.functional.cross_entropy(model(x), y) * 1e6).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
    total = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None) ** 0.5
    torch.testing.assert_close(total, torch.tensor(1.0))
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter - before[name]).abs().max() <= 0.06, name


def test_clips_join_the_optimizer_without_weight_decay() -> None:
    model = convolutions()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}])
    x, y = batch()
    fxslim.prepare_qat(model, example_inputs=x, optimizer=optimizer)
    learned = {id(p) for q in each_activation_quantizer(model).values() for p in q.parameters()}
    assert len(learned) > 4
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(decayed), len(others), len(learned)]
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == learned
    assert optimizer.param_groups[2]["weight_decay"] == 0
    before = states(model)
    for _ in range(3):
        step(model, optimizer, x, y)
    assert all(not torch.equal(model.get_parameter(n), before[n]) for n in before if n.endswith("clip_max"))


@networks
@pytest.mark.parametrize(
    ("method", "use_reentrant"), [("ulq", False), ("ulq", True), ("min_max", False), ("lsq", True)]
)
def test_activation_checkpointing_changes_nothing(network: str, method: str, use_reentrant: bool) -> None:
    """Calibration included: the batch that is seen twice counts once, and passes in the same way."""
    torch.manual_seed(3)
    model = NETWORKS[network]()
    example, _ = batch()
    fxslim.prepare_qat(model, QuantConfig(activation=ActivationQuant(method=method)), example_inputs=example).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # It counts a repeated batch twice, quantized or not.
            module.momentum = 0.0
    other = copy.deepcopy(model)
    updates = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (model, other)]
    for x, y in batches(4):
        x.requires_grad_()
        for net, update in zip((model, other), updates, strict=True):
            update.zero_grad()
            outputs = net(x) if net is model else checkpoint(net, x, use_reentrant=use_reentrant)
            nn.functional.cross_entropy(outputs, y).backward()
            update.step()
        one, two = (
            {name: v for name, v in states(net).items() if "num_batches_tracked" not in name} for net in (model, other)
        )
        assert_equal(one, two)


@networks
def test_averaged_copies(network: str) -> None:
    model, optimizer = prepared(network)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, (x, y) in enumerate(batches(4)):
        step(model, optimizer, x, y)
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            old = expected[name] if number else parameter.detach()
            expected[name] = 0.5 * old + 0.5 * parameter.detach()
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)
    before, (x, y) = average.eval()(x), batch()
    step(model, optimizer, x, y)
    assert before.isfinite().all()
    for name, quantizer in each_activation_quantizer(average.module).items():
        own = model.get_submodule(name)
        assert quantizer.is_calibrated, name
        assert all(a is not b for a, b in zip(quantizer.buffers(), own.buffers(), strict=True)), name
