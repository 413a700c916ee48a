# SPDX-License-Identifier: Apache-2.0
"""Batch norms folded before quantization: the folded weight is on a grid, the model goes on as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxslim
from fxslim.nn import QuantConfig, WeightQuant
from fxslim.nn.norm_folding import folded_scale

X = torch.randn(8, 3, 10, 10)


def network(transposed: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    second: Any = nn.ConvTranspose2d(8, 8, 3, groups=2) if transposed else nn.Conv2d(8, 8, 3, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 3)
    return model


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["arq", "lsq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_folded_weight_is_on_the_grid(granularity: str, method: str, transposed: bool) -> None:
    """Norm after convolution equals one convolution with weights that are whole numbers times a scale."""
    config = QuantConfig(weight=WeightQuant(granularity=granularity, method=method), activation=None)
    plan = fxslim.plan_quantization(network(transposed), config, example_inputs=X, fold_batch_norms=True)
    assert plan.folds == {"0": "1", "3": "4"}
    assert "2 batch norms are folded" in str(plan)
    model: Any = plan.apply(network(transposed)).eval()
    y = X
    for conv, norm in ((model[0], model[1]), (model[3], model[4])):
        quantizer = conv.weight_quantizer
        shift = folded_scale(norm)
        weight = quantizer.layout.rows(conv.computed().detach()) * shift.reshape(-1, 1, 1, 1)
        scale = conv.scale if granularity == "tensor" and method == "lsq" else None
        if granularity == "channel":
            scale = (conv.scale * shift.abs()).reshape(-1, 1, 1, 1)
        elif scale is None:
            scale = weight.abs().max() / 127
        numbers = weight.detach() / scale.detach()
        torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-3)
        assert float(numbers.abs().max()) <= (127.001 if granularity == "channel" else 128.001)
        folded = copy.deepcopy(conv)
        with torch.no_grad():
            folded.weight.copy_(quantizer.layout.restored(weight))
            folded.bias.copy_(norm.bias + (conv.bias - norm.running_mean) * shift)
            folded.weight_quantizer = folded.__dict__["_folded"] = None
            torch.testing.assert_close(folded(y), norm(conv(y)), rtol=1e-4, atol=1e-4)
            y = norm(conv(y)).relu()


def test_training_uses_the_statistics_of_the_batch_until_norms_freeze() -> None:
    model: Any = fxslim.prepare_qat(network(), "w8", example_inputs=X, fold_batch_norms=True, freeze_after=2)
    for number in range(4):
        before = model[1].running_mean.clone()
        model.train()(X)
        assert torch.equal(before, model[1].running_mean) == (number >= 2)
    model.eval()
    assert int(model[1].num_batches_tracked) == 2


def test_taking_it_all_away_leaves_the_float_model(tmp_path: Any) -> None:
    float_model = network().eval()
    model: Any = fxslim.prepare_qat(copy.deepcopy(float_model), example_inputs=X, fold_batch_norms=True)
    with fxslim.calibrating(model), torch.no_grad():
        model(X)
    for name in ("0", "3"):
        setattr(model, name, model.get_submodule(name).to_float())
    for name in ("2", "5"):
        setattr(model, name, nn.ReLU())
    assert torch.equal(model(X), float_model(X))


def test_copies_and_files_keep_the_fold(tmp_path: Any) -> None:
    config = QuantConfig(weight=WeightQuant(granularity="tensor"))
    model: Any = fxslim.prepare_qat(network(), config, example_inputs=X, fold_batch_norms=True, freeze_after=1)
    model(X)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.mul_(3)
    assert not torch.equal(twin[0].computed(), model[0].computed())
    fxslim.save(model, tmp_path / "model")
    loaded = fxslim.load(network(), tmp_path / "model")
    assert torch.equal(loaded.eval()(X), model.eval()(X))


def test_wishes_that_can_not_be() -> None:
    with pytest.raises(fxslim.ConfigError, match="fold_batch_norms=True needs example_inputs"):
        fxslim.plan_quantization(network(), fold_batch_norms=True)
    with pytest.raises(fxslim.ConfigError, match=r"freeze_after=3 .* needs fold_batch_norms=True"):
        fxslim.plan_quantization(network(), freeze_after=3, example_inputs=X)
