# SPDX-License-Identifier: Apache-2.0
"""Models out of training: what they compute, what is saved of them, what is refused, and that errors change nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import CalibrationError, CheckpointError, ConfigError, PlanError
from fxslim.nn import ActivationQuant, QuantConfig, QuantizedLayer
from fxslim.nn.deployed_layers import DeployedLayer
from fxslim.nn.quantizers import ActivationQuantizer
from tests.quantization.small_networks import NETWORKS

networks = pytest.mark.parametrize("network", NETWORKS)


def quantized(network: str, config: Any = "int8", **wishes: Any) -> tuple[nn.Module, Tensor]:
    """A quantized model whose norms have statistics, and an input."""
    torch.manual_seed(0)
    model, x = NETWORKS[network]().train(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        model(x)
    return fxslim.quantize(model.eval(), config, data=[x], calibration="min_max", **wishes), x


def assert_close(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        one, two = model(x), other(x)
    assert (one - two).norm() <= 1e-3 * one.norm()


@networks
@pytest.mark.parametrize("shown", [False, True], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_converted_models_compute_what_was_simulated(network: str, shown: bool, target: str) -> None:
    model, x = quantized(network, target=target)
    simulated = copy.deepcopy(model)
    converted = fxslim.convert(model, example_inputs=x if shown else None)
    assert converted is model
    assert_close(simulated, converted, torch.randn_like(x))


@networks
@pytest.mark.parametrize("config", ["int8", "w4"])
def test_saved_and_loaded(network: str, config: str, tmp_path: Path) -> None:
    model, x = quantized(network, config, fold_batch_norms=True)
    fxslim.convert(model, example_inputs=x)
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(NETWORKS[network](), tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert [type(plan) for plan in fxslim.applied(loaded)] == [fxslim.QuantizationPlan, fxslim.ConvertPlan]


def test_a_plan_is_saved_loaded_and_applied(tmp_path: Path) -> None:
    model, x = quantized("convolutions")
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=x)
    plan.save(tmp_path / "plan.json")
    read = fxslim.load_plan(tmp_path / "plan.json")
    assert str(read) == str(plan)
    with torch.no_grad():
        assert torch.equal(read.apply(twin)(x), plan.apply(model)(x))


@pytest.mark.parametrize(("config", "most"), [("int8", 0.27), ("w4", 0.15)])
def test_the_state_is_about_a_quarter(config: str, most: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 256))
    x = torch.randn(1, 3, 8, 8)

    def size() -> int:
        return sum(state.numel() * state.element_size() for state in model.state_dict().values())

    before = size()
    fxslim.convert(fxslim.quantize(model, config, data=[x]), example_inputs=x)
    assert size() < most * before


def test_norms_become_part_of_convolutions() -> None:
    model, x = quantized("convolutions")
    simulated = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=x)
    assert {one.name: one.norm for one in plan.layers if one.norm} == {
        "0": "1", "3.conv1": "3.norm1", "3.conv2": "3.norm2",
    }  # fmt: skip
    plan.apply(model)
    assert isinstance(model[1], nn.Identity)
    assert isinstance(model[3].norm2, nn.Identity)
    assert_close(simulated, model, torch.randn_like(x))


class Returns(nn.Module):
    """Gives what its norm reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, self.norm(y)


def test_norms_stay_where_what_they_read_is_returned_or_changed_by_a_hook() -> None:
    x = torch.randn(2, 3, 8, 8)
    models: list[nn.Module] = [Returns(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))]
    models[1][0].register_forward_hook(lambda module, args, output: output - 1)
    for model in models:
        model.train()(x)
        fxslim.quantize(model.eval(), "int8", data=[x], target="tensorrt")
        assert [one.norm for one in fxslim.plan_convert(model, example_inputs=x).layers] == [None]


def test_inputs_tell_the_grid_of_what_comes_quantized() -> None:
    model, x = quantized("convolutions")
    blind = fxslim.plan_convert(model)
    assert any("3.conv1 computes in float" in note for note in blind.notes)
    plan = fxslim.plan_convert(model, example_inputs=x)
    given = {one.name: one.given for one in plan.layers}
    assert given["3.conv1"] is not None
    assert isinstance(model.get_submodule(given["3.conv1"]), ActivationQuantizer)
    assert not plan.notes


def test_nothing_that_learns_is_left() -> None:
    model, x = quantized("convolutions", fold_batch_norms=True, freeze_after=1)
    fxslim.convert(model, example_inputs=x)
    assert not [m for m in model.modules() if isinstance(m, ActivationQuantizer | QuantizedLayer)]
    assert not list(model.parameters())
    y = model.train()(x)
    assert torch.equal(y, model.eval()(x))


def test_hooks_and_attributes_of_users_stay() -> None:
    model = fxslim.quantize(nn.Sequential(nn.Linear(8, 4)), "int8", data=[torch.randn(2, 8)])
    seen = []
    layer = model[0]
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    layer.mine = "mine"
    fxslim.convert(model)(torch.randn(2, 8))
    assert model[0] is layer is seen[0]
    assert isinstance(layer, DeployedLayer)
    assert layer.mine == "mine"


def test_a_model_that_is_one_layer() -> None:
    model = fxslim.quantize(nn.Linear(8, 4), "int8", data=[torch.randn(2, 8)])
    assert isinstance(fxslim.convert(model), DeployedLayer)
    assert len(fxslim.applied(model)) == 2


def test_compiled_models_compute_in_float() -> None:
    model, x = quantized("convolutions")
    fxslim.convert(model, example_inputs=x)
    exported = torch.export.export(model, (x,)).module()
    assert_close(model, exported, x)


def test_the_plan_is_a_table() -> None:
    model = fxslim.quantize(
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), "w4", data=[torch.zeros(1, 64)]
    )
    assert str(fxslim.plan_convert(model)).splitlines() == [
        "layer  kernel  bytes before  bytes after",
        "0      float          8,320        1,280",
        "2      float          1,056          192",
        "2 layers: 9,376 -> 1,472 bytes (15.7% kept)",
    ]


def test_models_that_are_not_ready_are_refused() -> None:
    with pytest.raises(ConfigError, match="no layer of this model is quantized, and none has zero blocks: prepare_qat"):
        fxslim.convert(nn.Linear(2, 2))
    config = QuantConfig(activation=ActivationQuant(batch_num=4))
    model = fxslim.prepare_qat(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), config)
    model(torch.randn(2, 4))
    with pytest.raises(CalibrationError, match=r"2 quantizers are not ready: the input of 0 has seen 1 of 4 batches"):
        fxslim.convert(model)
    fxslim.quantization.switch_quantizers(model, False)
    with pytest.raises(CalibrationError, match="the weight of 0 is switched off"):
        fxslim.convert(model)


def test_a_plan_for_another_model_is_refused() -> None:
    model, x = quantized("convolutions")
    plan = fxslim.plan_convert(model, example_inputs=x)
    other = fxslim.quantize(nn.Linear(8, 4), "int8", data=[torch.randn(2, 8)])
    with pytest.raises(PlanError, match="the plan does not fit this model"):
        plan.apply(other)
    plan.apply(model)
    with pytest.raises(PlanError, match="the plan does not fit this model"):
        plan.apply(model)
    with pytest.raises(ConfigError, match="no layer of this model is quantized"):
        fxslim.plan_convert(model)
    with pytest.raises(ConfigError, match="a converted model does not train"):
        plan.apply(model, optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


@pytest.mark.parametrize("damage", [{"version": 9}, {"layers": [["0"]]}, {"shapes": None}])
def test_damaged_plans_are_refused(damage: dict[str, Any]) -> None:
    model, x = quantized("convolutions")
    data = fxslim.plan_convert(model, example_inputs=x).to_dict() | damage
    with pytest.raises(CheckpointError, match=r"expected a convert plan of version 1|the plan is damaged"):
        fxslim.ConvertPlan.from_dict(data)


def test_after_an_error_the_model_is_as_it_was() -> None:
    model, x = quantized("convolutions")
    plan = fxslim.plan_convert(model, example_inputs=x)
    before, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    kinds = {name: type(module) for name, module in before.items()}
    with torch.no_grad():
        y = model(x)

    def fails(module: nn.Module, args: Any) -> None:
        if isinstance(model[0], DeployedLayer):
            raise ValueError("late")

    model[6].register_forward_pre_hook(fails)
    with pytest.raises(PlanError, match=r"the converted model's forward failed on .*ValueError: late"):
        plan.apply(model)
    assert dict(model.named_modules()) == before
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(model(x), y)
    assert len(fxslim.applied(model)) == 1
