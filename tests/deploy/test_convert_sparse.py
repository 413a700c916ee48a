# SPDX-License-Identifier: Apache-2.0
"""Sparse models out of training: which layers skip zeros, what they compute, what is saved, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxslim
from fxslim.errors import CheckpointError, ConfigError, PlanError
from fxslim.nn import BlockSparseConv2d, BlockSparseLinear, Int8BlockSparseConv2d, MaskedWeights
from fxslim.patterns import NM, Block

X = torch.randn(2, 64, 8, 8)


def network() -> nn.Sequential:
    """Wide enough for the kernels, but for its last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 64, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    with torch.no_grad():
        model(3 * X + 1)
    return model.eval()


def sparse_network(pattern: Any = "cin32cout64", **settings: Any) -> nn.Module:
    return fxslim.sparsify(network(), pattern, ratio=0.5 if pattern == "cin32cout64" else None, **settings)


def assert_close(model: nn.Module, other: nn.Module, x: Tensor, relative: float = 1e-5) -> None:
    with torch.no_grad():
        one, two = model(x), other(x)
    assert (one - two).norm() <= relative * one.norm()


def forms(plan: Any) -> dict[str, str]:
    return {one.name: one.kernel for one in plan.layers}


def test_resnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
    fxslim.sparsify(model.eval(), "cin32cout64", ratio=0.5)
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=x)
    assert forms(plan)["layer2.0.conv1"] == "block-sparse, 18 of 36 blocks"
    assert forms(plan)["conv1"] == "dense: 3 input channels, fewer than 32"
    assert sum(one.form == "blocks" for one in plan.layers) == 19
    assert plan.apply(model) is model
    # The ReLU of a block clamps its sum, too.
    assert model.layer1[0].conv1.has_relu
    assert not model.layer1[0].conv2.has_relu
    assert type(model.layer1[0].relu) is nn.ReLU
    assert isinstance(model.layer1[0].bn1, nn.Identity)
    assert not [module for module in model.modules() if isinstance(module, MaskedWeights)]
    assert_close(twin, model, torch.randn_like(x))
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(torchvision.models.resnet18(num_classes=10), tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    kept = [type(applied).__name__ for applied in fxslim.applied(loaded)]
    assert kept == ["SparsityPlan", "ConvertPlan"]


def test_the_plan_is_a_table() -> None:
    plan = fxslim.plan_convert(sparse_network(skip=["3"]), example_inputs=X)
    assert str(plan).splitlines() == [
        "layer  kernel                                            bytes before  bytes after",
        "0      block-sparse, 18 of 36 blocks, 1 folded in, ReLU       278,408      147,996",
        "7      block-sparse, 8 of 16 blocks, ReLU                     164,352       66,124",
        "9      dense: 10 filters, fewer than 32                         6,440        5,160",
        "3 layers: 449,200 -> 219,280 bytes (48.8% kept)",
    ]
    assert plan.relus == ("2", "8")


@pytest.mark.parametrize("shown", [False, True], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("sparse", ["auto", True, False])
def test_converted_models_compute_the_same(shown: bool, sparse: Any) -> None:
    model = sparse_network()
    twin = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=X if shown else None, sparse=sparse)
    assert isinstance(model[0], BlockSparseConv2d) == (sparse is not False)
    assert isinstance(model[9], BlockSparseLinear) == (sparse is True)
    # Grouped layers have no blocks over all channels.
    assert type(model[3]) is nn.Conv2d
    assert type(model[9]) is nn.Linear or sparse is True
    assert_close(twin, model, torch.randn_like(X))


def test_a_plan_is_saved_loaded_and_applied(tmp_path: Path) -> None:
    model = sparse_network()
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=X)
    plan.save(tmp_path / "plan.json")
    read = fxslim.load_plan(tmp_path / "plan.json")
    assert str(read) == str(plan)
    assert read.to_dict() == plan.to_dict()
    with torch.no_grad():
        assert torch.equal(read.apply(twin)(X), plan.apply(model)(X))


def test_a_plan_packs_the_blocks_that_it_finds(tmp_path: Path) -> None:
    """Masks are values: those of another training may hold another number of blocks."""
    model, other = sparse_network(), sparse_network()
    plan = fxslim.plan_convert(model, example_inputs=X)
    with torch.no_grad():
        other[7].weight_mask[:, :32] = False
    twin = copy.deepcopy(other)
    plan.apply(other)
    assert other[7].weight.num_blocks < model[7].weight_mask.sum() // (32 * 64)
    fxslim.save(other, tmp_path / "model.safetensors")
    loaded = fxslim.load(network(), tmp_path / "model.safetensors").eval()
    assert_close(twin, loaded, X)


def test_weights_with_zero_blocks_of_ones_own() -> None:
    model = network()
    with torch.no_grad():
        model[7].weight[:64] = 0
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model)
    assert forms(plan) == {"7": "block-sparse, 8 of 16 blocks"}
    plan.apply(model)
    assert_close(twin, model, X)


def test_baked_models_keep_the_pattern_of_their_masks(tmp_path: Path) -> None:
    pattern = Block(cin=16, cout=8, ratio=0.5)
    model = fxslim.sparsity.bake(fxslim.sparsify(network(), pattern, layers=["7"]))
    twin = copy.deepcopy(model)
    fxslim.convert(model)
    assert (model[7].weight.cin, model[7].weight.cout) == (16, 8)
    assert_close(twin, model, X)
    fxslim.save(model, tmp_path / "model.safetensors")
    assert_close(fxslim.load(network(), tmp_path / "model.safetensors").eval(), model, X)


@pytest.mark.parametrize("config", ["int8", "w4a8", "w8", "w16a16"])
@pytest.mark.parametrize("folded", [False, True])
def test_masked_and_quantized(config: str, folded: bool, tmp_path: Path) -> None:
    model = sparse_network()
    fxslim.quantize(model, config, data=[X], fold_batch_norms=folded)
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=X)
    plan.apply(model)
    in_bytes = config in ("int8", "w4a8")
    assert isinstance(model[0], Int8BlockSparseConv2d) == in_bytes
    assert forms(plan)["0"].startswith("block-sparse int8, 18 of 36 blocks") == in_bytes
    # Few filters pay where the dense layer multiplies bytes.
    assert forms(plan)["9"].startswith("block-sparse int8, 2 of 4 blocks") == in_bytes
    for name in ("0", "9"):
        assert (
            in_bytes or "dense: integers that skip zeros need inputs and weights of at most 8 bits" in forms(plan)[name]
        )
    assert_close(twin, model, X, 1e-3)
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(network(), tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), model(X))


def test_zeros_that_are_quantized_after_baking() -> None:
    model = fxslim.sparsity.bake(sparse_network())
    fxslim.quantize(model, "int8", data=[X])
    twin = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=X)
    assert model[0].kernel == "block-sparse int8, 18 of 36 blocks"
    assert_close(twin, model, X, 1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "unstructured"])
def test_other_patterns_become_dense(pattern: str) -> None:
    model = fxslim.sparsify(network(), pattern, ratio=0.5 if pattern == "unstructured" else None)
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=X)
    assert all(one.form == "dense" for one in plan.layers)
    shown = "2:4 brings no speed on cpu" if pattern == "2:4" else "kernels skip whole blocks, not the zeros of"
    assert shown in forms(plan)["7"]
    assert any("layers with a 2:4 mask become dense ones" in note for note in plan.notes) == (pattern == "2:4")
    plan.apply(model)
    assert [type(module).__name__ for module in model] == [type(module).__name__ for module in network()]
    assert_close(twin, model, X, 1e-6)
    assert fxslim.patterns.check(model[7], NM(2, 4) if pattern == "2:4" else twin[7].current_pattern).ok


def test_hooks_attributes_and_references_stay() -> None:
    model, seen = sparse_network(), []
    layer = model[7]
    layer.mine = "mine"
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    fxslim.convert(model)(X)
    assert model[7] is layer is seen[0]
    assert layer.mine == "mine"
    assert not list(layer.parameters())


def test_a_model_that_is_one_layer() -> None:
    model = fxslim.convert(fxslim.sparsify(nn.Linear(128, 64), "cin32cout64", ratio=0.5))
    assert isinstance(model, BlockSparseLinear)
    assert len(fxslim.applied(model)) == 2


def test_encoders_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    fxslim.sparsify(model, "cin32cout64", ratio=0.5)
    x, padding = torch.randn(2, 6, 64), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 3:] = True
    twin = copy.deepcopy(model)
    plan = fxslim.plan_convert(model, example_inputs=x)
    assert "nn.MultiheadAttention multiplies" in forms(plan)["layers.0.self_attn"]
    assert "nn.MultiheadAttention multiplies" in forms(plan)["layers.0.self_attn.out_proj"]
    plan.apply(model)
    assert isinstance(model.layers[0].linear1, BlockSparseLinear)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    with torch.no_grad():
        one, two = (net(x, src_key_padding_mask=padding)[~padding] for net in (twin, model))
    assert (one - two).norm() <= 1e-5 * one.norm()


def test_encoders_with_zero_blocks_of_ones_own() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1).eval()
    with torch.no_grad():
        model.layers[0].linear1.weight[:, :32] = 0
        model.layers[0].linear2.weight[:, 32:] = 0
    x, padding = torch.randn(2, 6, 64), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 3:] = True
    twin = copy.deepcopy(model)
    fxslim.convert(model)
    with torch.no_grad():
        one, two = (net(x, src_key_padding_mask=padding)[~padding] for net in (twin, model))
    assert (one - two).norm() <= 1e-5 * one.norm()


class ReadsWeights(nn.Module):
    """Its first layer's weight is read past it, its last two share one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.third.weight = self.second.weight
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight[:, :32] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.third(self.second(nn.functional.linear(x, self.first.weight))))


def test_weights_that_others_read_stay() -> None:
    model, x = ReadsWeights(), torch.randn(2, 64)
    first = {"first": "dense: the model reads its weight"}
    assert forms(fxslim.plan_convert(model, sparse=True)) == {
        **first, "second": "dense: it shares its weight with third", "third": "dense: it shares its weight with second",
    }  # fmt: skip
    assert forms(fxslim.plan_convert(model, example_inputs=x, sparse=True)) == {
        **first, "second": "dense: another module reads its weight", "third": "dense: it shares its weight with second",
    }  # fmt: skip


def test_what_has_neither_small_weights_nor_zeros_is_refused() -> None:
    text = r"no layer of this model is quantized, and none has zero blocks: prepare_qat.* sparsify\(model"
    with pytest.raises(ConfigError, match=text):
        fxslim.convert(network())
    with pytest.raises(ConfigError, match=r"sparse must be 'auto', True .* or False, got 'yes'"):
        fxslim.convert(sparse_network(), sparse="yes")


def test_weights_that_violate_their_pattern_are_refused() -> None:
    model = sparse_network()
    plan = fxslim.plan_convert(model)
    model[7].set_mask(torch.ones_like(model[7].weight_mask))
    before = {name: type(module) for name, module in model.named_modules()}
    text = r"7\.weight violates its pattern cin32cout64 50%: 8 of its 16 blocks should be zero and are not"
    with pytest.raises(PlanError, match=text):
        fxslim.plan_convert(model)
    with pytest.raises(PlanError, match=text):
        plan.apply(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    fxslim.convert(copy.deepcopy(model), sparse=False)
    model[7].refresh()
    plan.apply(model)


@pytest.mark.parametrize("quantized", [False, True])
def test_after_an_error_the_model_is_as_it_was(quantized: bool) -> None:
    model = sparse_network()
    if quantized:
        fxslim.quantize(model, "int8", data=[X])
    plan = fxslim.plan_convert(model, example_inputs=X)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    with torch.no_grad():
        y = model(X)

    def fails(module: nn.Module, args: Any) -> None:
        if not isinstance(model[0], nn.Conv2d):
            raise ValueError("late")

    handle = model[9].register_forward_pre_hook(fails)
    with pytest.raises(PlanError, match=r"the converted model's forward failed on .*ValueError: late"):
        plan.apply(model)
    handle.remove()
    assert dict(model.named_modules()) == modules
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in modules.items()
    }
    for name, module in modules.items():
        assert vars(module).keys() == attributes[name].keys()
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with torch.no_grad():
        assert torch.equal(model(X), y)
    plan.apply(model)


@pytest.mark.parametrize(
    "damage",
    [["strange"], ["blocks"], ["dense", {}], ["blocks", {"cin": 0, "cout": 64, "num_blocks": 1, "relu": False}],
     ["blocks", {"cin": 32, "cout": 64, "num_blocks": -1, "relu": False}], ["blocks", {"cin": 32}]],
)  # fmt: skip
def test_damaged_plans_are_refused(damage: list[Any]) -> None:
    data = fxslim.plan_convert(sparse_network()).to_dict()
    data["layers"][0][6:] = damage
    with pytest.raises(CheckpointError, match="the plan is damaged"):
        fxslim.ConvertPlan.from_dict(data)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = fxslim.plan_convert(sparse_network())
    with pytest.raises(PlanError, match="the plan does not fit this model"):
        plan.apply(network())
