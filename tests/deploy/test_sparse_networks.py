# SPDX-License-Identifier: Apache-2.0
"""Whole networks of different kinds with zero blocks: converted, saved, loaded, exported."""

import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import fxslim
from fxslim.errors import PlanError
from fxslim.nn import MaskedWeights
from fxslim.nn.block_sparse_layers import BlockSparseLayer
from fxslim.nn.int8_block_sparse import Int8BlockSparseLayer
from fxslim.patterns import Block
from tests.quantization.small_networks import NETWORKS

BLOCK = Block(cin=4, cout=4, ratio=0.5)
networks = pytest.mark.parametrize("network", NETWORKS)
inputs_shown = pytest.mark.parametrize("shown", [False, True], ids=["without inputs", "with inputs"])


def sparse_network(network: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = NETWORKS[network]().train(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        model(x)
    return fxslim.sparsify(model.eval(), BLOCK, example_inputs=x), x


def distance(one: nn.Module, two: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = one(x)
        return float((two(x) - y).norm() / y.norm())


def skipping(model: nn.Module) -> list[str]:
    kinds = BlockSparseLayer | Int8BlockSparseLayer
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


@networks
@inputs_shown
def test_masked(network: str, shown: bool, tmp_path: Path) -> None:
    model, x = sparse_network(network)
    twin = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=x if shown else None, sparse=True)
    assert skipping(model)
    assert not [module for module in model.modules() if isinstance(module, MaskedWeights)]
    assert distance(twin, model, torch.randn_like(x)) < 1e-5
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(NETWORKS[network](), tmp_path / "model.safetensors").eval()
    assert skipping(loaded) == skipping(model)
    assert distance(loaded, model, x) == 0


@networks
@inputs_shown
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_masked_and_quantized(network: str, shown: bool, target: str, tmp_path: Path) -> None:
    model, x = sparse_network(network)
    fxslim.quantize(model, "int8", data=[x], calibration="min_max", target=target)
    twin = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=x if shown else None, sparse=True)
    assert skipping(model)
    assert distance(twin, model, torch.randn_like(x)) < 1e-3
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(NETWORKS[network](), tmp_path / "model.safetensors").eval()
    assert distance(loaded, model, x) == 0


def contents(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes and hooks of all modules, and the objects of all states."""
    found: dict[str, Any] = {"states": {name: id(state) for name, state in model.state_dict(keep_vars=True).items()}}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        hooks = {key: list(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)}
        found[name] = type(module), id(module), vars(module).keys(), plain, hooks
    return found


@pytest.mark.parametrize("network", [*NETWORKS, "encoder"])
@pytest.mark.parametrize("quantized", [False, True])
def test_after_an_error_the_model_is_as_it_was(network: str, quantized: bool) -> None:
    if network == "encoder":
        x = torch.randn(2, 5, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = fxslim.sparsify(nn.TransformerEncoder(layer, 1).eval(), BLOCK, example_inputs=x)
    else:
        model, x = sparse_network(network)
    if quantized:
        fxslim.quantize(model, "int8", data=[x], calibration="min_max")
    plan = fxslim.plan_convert(model, example_inputs=x, sparse=True)
    last = list(model.modules())[-1]

    def fails(module: nn.Module, args: Any) -> None:
        if skipping(model):
            raise ValueError("late")

    handle = model.register_forward_pre_hook(fails)
    before, state, y = contents(model), copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(PlanError, match=r"the converted model's forward failed on .*ValueError: late"):
        plan.apply(model)
    assert contents(model) == before
    assert list(model.modules())[-1] is last
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)
    handle.remove()
    plan.apply(model)
    assert skipping(model)


@networks
def test_baked(network: str) -> None:
    model, x = sparse_network(network)
    masked = copy.deepcopy(model)
    fxslim.sparsity.bake(model)
    fxslim.convert(model, example_inputs=x, sparse=True)
    fxslim.convert(masked, example_inputs=x, sparse=True)
    assert set(skipping(model)) == set(skipping(masked))
    assert distance(masked, model, x) < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(8, 8, 3), lambda: nn.Conv3d(8, 8, 2), lambda: nn.ConvTranspose2d(8, 8, 3),
    ],
    ids=["Conv1d", "Conv3d", "ConvTranspose2d"],
)  # fmt: skip
def test_layers_without_a_kernel_become_dense(make: Any) -> None:
    layer = make()
    kind, x = type(layer), torch.randn(1, 8, *[6] * len(layer.kernel_size))
    model = fxslim.sparsify(layer, BLOCK)
    twin, plan = copy.deepcopy(model), fxslim.plan_convert(model, sparse=True)
    assert [one.kernel for one in plan.layers] == [f"dense: there are no kernels for a Masked{kind.__name__}"]
    assert type(plan.apply(model)) is kind
    assert distance(twin, model, x) < 1e-6


def test_a_weight_of_zeros_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    with torch.no_grad():
        model[0].weight.zero_()
    fxslim.convert(model, sparse=True)
    assert model[0].weight.num_blocks == 0
    fxslim.save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert distance(fxslim.load(fresh, tmp_path / "model.safetensors"), model, x) == 0


def test_an_onnx_file_holds_the_zeros(tmp_path: Path) -> None:
    model, x = sparse_network("convolutions")
    masked = copy.deepcopy(model)
    fxslim.convert(model, example_inputs=x, sparse=True)
    path = tmp_path / "model.onnx"
    fxslim.export_onnx(model, x, path)
    read = onnx.load(path)
    assert {node.op_type for node in read.graph.node} <= {
        "Conv", "Relu", "Add", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten", "Gemm",
    }  # fmt: skip
    weights = [numpy_helper.to_array(one) for one in read.graph.initializer]
    sparse = [weight.shape for weight in weights if weight.ndim == 4 and (weight == 0).mean() > 0.4]
    assert sorted(sparse) == [(8, 3, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        expected = masked(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
