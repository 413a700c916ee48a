# SPDX-License-Identifier: Apache-2.0
"""From plain and masked layers to quantized ones and back: what stays the same object, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fxslim import ConfigError, UnsupportedLayerError
from fxslim.errors import DtypeError
from fxslim.nn import (
    ActivationQuant,
    Conv1dQAT,
    Conv2dQAT,
    ConvTranspose2dQAT,
    EmbeddingQAT,
    LinearQAT,
    MultiheadAttentionQAT,
    QuantConfig,
)
from tests.nn.quantized.quantized_layers import KINDS, weights_only

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_the_same_parameters_and_attributes(kind: str, training: bool) -> None:
    cls, arguments, shape = KINDS[kind]
    plain: Any = cls.float_class(*arguments, dtype=torch.float64)
    plain.train(training).bias.requires_grad_(False)
    plain.register_buffer("own", torch.ones(2), persistent=False)
    plain.remark, heard = ["kept"], []
    plain.register_forward_hook(lambda *call: heard.append(type(call[0])))
    before = set(vars(plain)), list(plain.state_dict()), len(plain._forward_pre_hooks)
    layer: Any = cls.from_float(plain, config="w4a8")
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert layer.own is plain.own
    assert layer.remark is plain.remark
    assert layer.training == training
    assert layer.input_quantizer.training == training
    assert (set(vars(plain)), list(plain.state_dict()), len(plain._forward_pre_hooks)) == before
    assert type(plain) is cls.float_class
    layer(torch.randn(shape, dtype=torch.float64))
    assert heard == [cls]
    assert layer.quant_config.weight.bits == 4


@kinds
def test_and_back(kind: str) -> None:
    cls, arguments, shape = KINDS[kind]
    plain: Any = cls.float_class(*arguments)
    layer: Any = cls.from_float(plain, config=QuantConfig(output=ActivationQuant()))
    layer(torch.randn(shape))
    again = layer.to_float()
    assert type(again) is type(plain)
    assert again.weight is plain.weight
    assert set(vars(again)) == set(vars(plain))
    assert list(again.state_dict()) == list(plain.state_dict())
    assert not again._forward_pre_hooks
    assert not again._modules
    x = torch.randn(shape)
    assert torch.equal(again(x), plain(x))
    assert layer.input_quantizer is not None
    assert cls.from_float(again).weight is plain.weight


def test_attention_and_back() -> None:
    plain = nn.MultiheadAttention(8, 2).eval()
    layer = MultiheadAttentionQAT.from_float(plain)
    assert layer.in_proj_weight is plain.in_proj_weight
    assert layer.out_proj.weight is plain.out_proj.weight
    assert type(layer.out_proj) is LinearQAT
    assert type(plain.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    again = layer.to_float()
    assert [type(module) for module in again.modules()] == [type(module) for module in plain.modules()]
    assert list(again.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 2, 8)
    assert torch.equal(again(x, x, x)[0], plain(x, x, x)[0])


def test_what_is_read_on_the_module() -> None:
    layer = LinearQAT(8, 4, config="int8")
    assert layer.scale.shape == layer.zero_point.shape == (4,)
    assert layer.weight.is_leaf
    attention = MultiheadAttentionQAT(8, 2)
    assert attention.scale.shape == (24,)
    with pytest.raises(ConfigError, match=r"this MultiheadAttentionQAT has the weights q_proj_weight, k_proj_weight"):
        _ = MultiheadAttentionQAT(8, 2, kdim=4).scale
    with pytest.raises(ConfigError, match="this LinearQAT has no quantized weight: its config has weight=None"):
        _ = LinearQAT(8, 4, config=QuantConfig(weight=None)).zero_point


class Halved(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: LinearQAT.from_float(Halved(8, 4)), UnsupportedLayerError, "takes a Linear, got a Halved: a subclass"),
        (lambda: Conv2dQAT.from_float(nn.Conv1d(8, 4, 1)), UnsupportedLayerError, "a Conv2d, got a Conv1d$"),
        (lambda: LinearQAT.from_float(nn.ReLU()), UnsupportedLayerError, "takes a Linear, got a ReLU"),
        (lambda: LinearQAT.from_float(LinearQAT(8, 4)), UnsupportedLayerError, "this LinearQAT is quantized already"),
        (
            lambda: LinearQAT.from_float(parametrizations.weight_norm(nn.Linear(8, 4))),
            UnsupportedLayerError,
            "got a ParametrizedLinear",
        ),
        (
            lambda: LinearQAT.from_float(torch.nn.utils.spectral_norm(nn.Linear(8, 4))),
            UnsupportedLayerError,
            "weight of this Linear is no parameter.*remove that first",
        ),
        (
            lambda: Conv1dQAT(4, 4, 3, padding=1, padding_mode="reflect"),
            ConfigError,
            "Conv1dQAT pads with zeros, got padding_mode='reflect'",
        ),
        (
            lambda: Conv2dQAT.from_float(nn.Conv2d(4, 4, 3, padding_mode="circular")),
            ConfigError,
            "Conv2dQAT pads with zeros, got padding_mode='circular'",
        ),
        (
            lambda: LinearQAT(10, 4, config=weights_only(granularity="group", group_size=4)),
            ConfigError,
            r"weight of this Linear: weight.group_size=4 does not divide the 10 inputs of a weight of shape \(4, 10\)",
        ),
        (
            lambda: Conv2dQAT.from_float(nn.Conv2d(8, 4, 3, groups=2), weights_only(granularity="group", group_size=8)),
            ConfigError,
            "weight of this Conv2d: weight.group_size=8 does not divide the 4 inputs",
        ),
        (lambda: EmbeddingQAT(4, 3, max_norm=1.0), UnsupportedLayerError, "EmbeddingQAT: max_norm=1.0 is for a table"),
        (
            lambda: EmbeddingQAT.from_float(nn.Embedding(4, 3, sparse=True)),
            UnsupportedLayerError,
            "EmbeddingQAT: sparse=True",
        ),
    ],
)
def test_refused_layers(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "layer, x, error, message",
    [
        (Conv2dQAT(4, 4, 3), torch.randn(4, 5, 5), ConfigError, r"takes inputs of 4 dims, got shape \(4, 5, 5\)"),
        (Conv1dQAT(4, 4, 3), torch.randn(1, 4, 5, 5), ConfigError, "Conv1dQAT takes inputs of 3 dims"),
        (ConvTranspose2dQAT(4, 4, 3), torch.randn(4, 5), ConfigError, "ConvTranspose2dQAT takes inputs of 4 dims"),
        (LinearQAT(4, 4), torch.ones(2, 4, dtype=torch.int64), DtypeError, "floating-point inputs, got torch.int64"),
        (EmbeddingQAT(4, 4), torch.randn(2), DtypeError, "EmbeddingQAT takes indices, got torch.float32"),
    ],
)
def test_refused_inputs(layer: nn.Module, x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(UnsupportedLayerError, match="LinearQAT takes no nested tensors: pad them"):
        LinearQAT(8, 4)(x)
    with pytest.raises(UnsupportedLayerError, match="MultiheadAttentionQAT takes no nested tensors: pad them"):
        MultiheadAttentionQAT(8, 2, batch_first=True)(x, x, x)


@pytest.mark.parametrize(
    "layer, arguments", [(LinearQAT(8, 4), 1), (EmbeddingQAT(8, 4), 0), (MultiheadAttentionQAT(8, 2), 3)]
)
def test_replicas_of_data_parallel_are_refused(layer: Any, arguments: int) -> None:
    layer._is_replica = True
    inputs = [torch.randn(3, 2, 8)] * arguments or [torch.tensor([1])]
    with pytest.raises(UnsupportedLayerError, match=r"runs inside of nn.DataParallel.*use .*DistributedDataParallel"):
        layer(*inputs)
