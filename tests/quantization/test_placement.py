# SPDX-License-Identifier: Apache-2.0
"""Where quantizers go: one for each tensor that the target computes with, and none twice."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18
from torchvision.models.vision_transformer import VisionTransformer

import fxslim
from fxslim.nn import ActivationQuant, QuantConfig
from fxslim.nn.quantizers import each_activation_quantizer
from fxslim.quantization import TARGETS, plan_quantization
from tests.graph.random_networks import RandomNetwork

X = torch.randn(2, 3, 32, 32)


class Join(nn.Module):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


class Block(nn.Module):
    """A residual block of its own kind: what it sums is what a convolution gave, and what came in."""

    def __init__(self, joined: bool = False) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm, self.relu, self.joined = nn.BatchNorm2d(8), nn.ReLU(), joined
        self.join = Join()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16 if joined else 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.norm(self.second(self.first(x)))
        x = self.join(x, y) if self.joined else x + y
        return self.head(self.pool(x).flatten(1))


def planned(model: nn.Module, target: str = "onnxruntime", x: Tensor = X) -> tuple[dict[str, QuantConfig], dict]:
    plan = plan_quantization(model.eval(), target=target, example_inputs=x)
    return {one.name: one.config for one in plan.layers}, dict(plan.outputs)


def test_a_sum_for_onnxruntime() -> None:
    """What two layers read is quantized where it is made; a layer alone quantizes what it reads."""
    layers, outputs = planned(Block())
    assert {name for name, config in layers.items() if config.activation is not None} == {
        "stem", "second", "head",
    }  # fmt: skip
    # x feeds a convolution and the sum; the norm is folded, so what is summed is its result.
    assert set(outputs) == {"relu", "norm"}
    assert outputs["relu"].fixed_min
    assert not outputs["norm"].fixed_min
    assert layers["head"].output is not None


def test_the_same_for_tensorrt_and_ascend() -> None:
    layers, outputs = planned(resnet18(), "tensorrt")
    # The layer before a sum adds what came in, or what the other branch made; behind layer4 the average is in float.
    blocks = {f"layer{i}.{j}" for i in range(1, 4) for j in range(2)}
    assert set(outputs) == blocks | {"relu"} | {f"layer{i}.0.downsample.1" for i in range(2, 5)}
    assert outputs["relu"].symmetric
    assert all(config.output is None for config in layers.values())
    layers, outputs = planned(Block(), "ascend")
    assert not outputs
    assert all(config.activation is not None and config.activation.signed for config in layers.values())


def test_parts_of_a_join_share_its_grid() -> None:
    """One quantizer behind the join: each value is quantized once."""
    model = fxslim.prepare_qat(Block(joined=True).eval(), example_inputs=X)
    met = quantizers_met(model, X)
    layers = [f"{name}.input_quantizer" for name in ("stem", "first", "second")]
    assert met == [*layers, "join.output_quantizer", "head.input_quantizer", "head.output_quantizer"]


def test_a_resnet_has_the_quantizers_that_its_runtime_fuses() -> None:
    layers, outputs = planned(resnet18())
    blocks = {f"layer{i}.{j}" for i in range(1, 5) for j in range(2)}
    norms = {f"{block}.bn2" for block in blocks} | {f"layer{i}.0.downsample.1" for i in range(2, 5)}
    assert set(outputs) == blocks | norms | {"relu"}
    own = {name for name, config in layers.items() if config.activation is not None}
    assert own == {"conv1", "fc"} | {f"{block}.conv2" for block in blocks}


def test_mobilenets_linear_bottlenecks() -> None:
    _, outputs = planned(mobilenet_v2())
    assert set(outputs) >= {"features.3.conv.3", "features.2.conv.3"}
    # One layer alone reads these.
    assert not {"features.1.conv.2", "features.3"} & set(outputs)
    assert not outputs["features.3.conv.3"].fixed_min


def test_sums_that_end_in_a_norm_of_the_transformer_stay_in_float() -> None:
    vit = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    layers, outputs = planned(vit)
    assert not [name for name in outputs if name.endswith(("dropout", "encoder_layer_0"))]
    assert layers["encoder.layers.encoder_layer_0.mlp.0"].activation is not None
    assert fxslim.prepare_qat(vit, example_inputs=X)(X).shape == (2, 5)


def test_a_layer_that_is_called_twice_is_refused_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.layer(self.layer(x)))

    plan = plan_quantization(Twice(), example_inputs=torch.randn(2, 4))
    assert [one.name for one in plan.layers] == ["other"]
    assert "layer stays in float: it is called 2 times in one forward" in str(plan)
    with pytest.raises(fxslim.UnsupportedLayerError, match="layer can't be quantized: it is called 2 times"):
        plan_quantization(Twice(), layers="layer", example_inputs=torch.randn(2, 4))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    assert [one.name for one in plan_quantization(tied).layers] == ["2"]


def test_a_tensor_without_a_module_is_told() -> None:
    class Bare(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.head(self.pool((x + self.first(x)).relu() * self.second(x)).flatten(1))

    plan = plan_quantization(Bare().eval(), example_inputs=X)
    assert any(
        "stays in float for" in note and "make it the result of a module of its own" in note for note in plan.notes
    )


def test_a_layer_that_reads_a_parameter_quantizes_it_itself() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.layer, self.other = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.queries) @ self.other(x).T

    plan = plan_quantization(Queries(), example_inputs=torch.randn(2, 4))
    assert all(one.config.activation is not None and not one.is_given for one in plan.layers)


class Shifted(nn.Module):
    """Two layers read the image, scaled; the second with a learned shift."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)) * 4
        return self.plain(x).relu() + self.other(x + self.shift).relu()


@pytest.mark.parametrize("method", ["ulq", "lsq", "lsq+", "pact", "min_max", "static"])
def test_the_range_of_the_models_own_input_is_followed(method: str) -> None:
    """Training needs no gradient of the image; where few bits or given clips make it worth one, it stays learned."""
    followed = "min_max" if method != "static" else "static"
    config = QuantConfig(activation=ActivationQuant(method=method))
    methods = {
        one.name: one.config.activation.method
        for one in plan_quantization(Shifted(), config, example_inputs=X).layers
        if one.config.activation is not None
    }
    # PACT knows no values below 0.
    chosen = "ulq" if method == "pact" else method
    assert methods == {"plain": followed, "other": chosen}
    few = QuantConfig(activation=ActivationQuant(method=method, bits=4))
    known = QuantConfig(activation=ActivationQuant(method=method, clip_min=-1.0, clip_max=2.0))
    for one in (few, known):
        kept = plan_quantization(resnet18(), one, example_inputs=X).layers[0].config.activation
        assert kept is not None
        assert kept.method == chosen


def test_the_image_needs_no_gradient_in_training() -> None:
    model = fxslim.prepare_qat(resnet18(), example_inputs=X).train()
    model(X)
    needless = []

    def look(quantizer: nn.Module, given: Any, result: Tensor) -> None:
        if not result.requires_grad:
            needless.append(quantizer)

    for quantizer in each_activation_quantizer(model).values():
        quantizer.register_forward_hook(look)
    model(X)
    assert needless == [model.conv1.input_quantizer]


def test_first_and_last_layer_and_overrides() -> None:
    plan = plan_quantization(
        resnet18(), "w4a4", first="int8", last="float", overrides={"layer1*": "w4a8"}, example_inputs=X
    )
    bits = {one.name: one.config.weight.bits for one in plan.layers if one.config.weight}
    assert bits["conv1"] == 8
    assert bits["layer2.0.conv1"] == 4
    assert "fc" not in bits
    with pytest.raises(fxslim.ConfigError, match="conv1 is in skip= and in overrides="):
        plan_quantization(resnet18(), skip="conv1", overrides={"conv1": "int8"})
    with pytest.raises(fxslim.ConfigError, match="skip: relu has no layer that can be quantized"):
        plan_quantization(resnet18(), skip="relu")


def test_entries_of_nni() -> None:
    """The last entry that matches a layer is its own; mixed widths."""
    entries = [
        {"op_types": ["Conv2d", "Linear"], "quant_types": ["weight", "input"], "quant_bits": 8},
        {"op_names": ["layer1.0.conv1"], "quant_types": ["weight"], "quant_bits": {"weight": 3}},
        {"op_names": ["fc"], "exclude": True},
    ]
    plan = plan_quantization(resnet18(), entries)
    configs = {one.name: one.config for one in plan.layers}
    assert "fc" not in configs
    assert configs["layer1.0.conv1"].weight.bits == 3
    assert configs["layer1.0.conv1"].activation is None
    assert configs["conv1"].activation.method == "min_max"


def quantizers_met(model: nn.Module, x: Tensor) -> list[str]:
    met: list[str] = []
    handles = [
        q.register_forward_hook(lambda *_, n=n: met.append(n)) for n, q in each_activation_quantizer(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return met


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), target=st.sampled_from(sorted(TARGETS)), static=st.booleans())
def test_random_networks(seed: int, target: str, static: bool) -> None:
    """Each quantizer runs once in a forward; at 16 bits the model computes nearly what it did; plans replay."""
    float_model, x = RandomNetwork(seed), torch.randn(2, 3, 8, 8)
    config = QuantConfig(activation=ActivationQuant(bits=16, method="static" if static else "min_max"))
    wide: Any = fxslim.nn.WeightQuant(bits=16)
    config = QuantConfig(weight=wide, activation=config.activation)
    plan = plan_quantization(float_model, config, target=target, example_inputs=x)
    again = type(plan).from_dict(plan.to_dict())
    assert str(again) == str(plan)
    fresh = copy.deepcopy(float_model)
    model = plan.apply(copy.deepcopy(float_model))
    met = quantizers_met(model.eval(), x)
    assert len(met) == len(set(met)) == plan.num_activations
    with fxslim.calibrating(model), torch.no_grad():
        model(x)
    with torch.no_grad():
        expected, found = float_model.eval()(x), model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(2e-2 * expected.abs().max() + 1e-6))
    assert set(again.apply(fresh).state_dict()) == set(model.state_dict())
