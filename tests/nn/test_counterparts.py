# SPDX-License-Identifier: Apache-2.0
"""From plain layers to masked ones and back: what stays the same object, what is refused, copies and files."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fxslim
from fxslim import ConfigError, UnsupportedLayerError
from fxslim.nn import MaskedConv2d, MaskedLinear, MaskedMultiheadAttention, MaskedWeights, MaskSettings
from fxslim.patterns import Block, Unstructured
from fxslim.schedules import LinearSchedule
from tests.nn.masked_layers import KINDS, plain_twin

kinds = pytest.mark.parametrize("kind", KINDS)


def plain_of(kind: str, **settings: object) -> tuple[type[MaskedWeights], nn.Module]:
    cls, arguments, _ = KINDS[kind]
    return cls, cls.float_class(*arguments, **settings)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_a_masked_layer_has_the_same_parameters_and_attributes(kind: str, training: bool) -> None:
    cls, plain = plain_of(kind, dtype=torch.float64)
    plain.train(training).bias.requires_grad_(False)
    plain.register_buffer("own", torch.ones(2), persistent=False)
    plain.remark = ["kept"]
    masked = cls.from_float(plain, pattern="2:4")
    assert masked.weight is plain.weight
    assert masked.bias is plain.bias
    assert masked.own is plain.own
    assert masked.remark is plain.remark
    assert masked.training == training
    assert not masked.bias.requires_grad
    assert "own" not in masked.state_dict()
    assert type(plain) is cls.float_class
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert set(masked.state_dict()) == {"weight", "bias", "weight_mask"}
    assert masked.weight_mask.dtype == torch.bool
    assert repr(masked) == repr(plain).replace(type(plain).__name__, cls.__name__)[:-1] + ", pattern=2:4)"


@kinds
def test_and_back(kind: str) -> None:
    cls, plain = plain_of(kind)
    masked = cls.from_float(plain.eval(), pattern="2:4", update_freq=1, regrow=0.1)
    masked.weight.requires_grad_(False)
    again = masked.to_float()
    assert type(again) is type(plain)
    assert torch.equal(again.weight, masked.weight * masked.weight_mask)
    assert again.weight is not masked.weight
    assert again.bias is masked.bias
    assert not again.weight.requires_grad
    assert not again.training
    assert set(vars(again)) == set(vars(plain))
    assert set(again.state_dict()) == set(plain.state_dict())
    assert not again._forward_pre_hooks
    assert masked.weight_mask is not None
    x = torch.randn(KINDS[kind][2])
    assert torch.equal(again(x), masked(x))


def test_hooks_go_along_and_are_counted_apart() -> None:
    """With keyword arguments too; taking one off the plain layer leaves that of the masked one."""
    plain, heard = nn.Linear(8, 4), []
    first = plain.register_forward_pre_hook(lambda layer, args, kwargs: heard.append(len(kwargs)), with_kwargs=True)
    second = plain.register_forward_hook(lambda layer, args, kwargs, output: heard.append(9), with_kwargs=True)
    masked = MaskedLinear.from_float(plain, pattern="2:4")
    first.remove()
    second.remove()
    masked(input=torch.randn(2, 8))
    assert heard == [1, 9]
    plain(torch.randn(2, 8))
    assert heard == [1, 9]


def test_hooks_on_loading_outlive_the_plain_layer() -> None:
    plain, heard = nn.Linear(8, 4), []
    plain.register_load_state_dict_pre_hook(lambda layer, *rest: heard.append(type(layer).__name__))
    masked = MaskedLinear.from_float(plain, pattern="2:4")
    state = masked.state_dict()
    del plain
    masked.load_state_dict(state)
    assert heard == ["MaskedLinear"]


class Halved(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: MaskedLinear.from_float(Halved(8, 4), pattern="2:4"), UnsupportedLayerError, "a Linear, got a Halved"),
        (lambda: MaskedConv2d.from_float(nn.Conv1d(8, 4, 1), pattern="2:4"), UnsupportedLayerError, "got a Conv1d"),
        (
            lambda: MaskedLinear.from_float(MaskedLinear(8, 4, pattern="2:4"), pattern="2:4"),
            UnsupportedLayerError,
            "MaskedLinear.from_float takes a Linear, got a MaskedLinear",
        ),
        (
            lambda: MaskedLinear.from_float(parametrizations.weight_norm(nn.Linear(8, 4)), pattern="2:4"),
            UnsupportedLayerError,
            "got a ParametrizedLinear",
        ),
        (
            lambda: MaskedLinear.from_float(torch.nn.utils.spectral_norm(nn.Linear(8, 4)), pattern="2:4"),
            UnsupportedLayerError,
            "weight of this Linear is no parameter.*computed",
        ),
        (lambda: MaskedLinear.from_float(nn.Linear(8, 4)), ConfigError, "need pattern=, such as '2:4'"),
        (
            lambda: MaskedLinear.from_float(nn.Linear(8, 4), pattern="2:4", update_frequency=1),
            ConfigError,
            "unknown mask setting 'update_frequency'; did you mean 'update_freq'",
        ),
        (lambda: MaskSettings.from_dict({"patern": {}}), ConfigError, "did you mean 'pattern'"),
        (lambda: MaskedLinear(8, 4, pattern="cin4cout4"), ConfigError, "pattern cin4cout4 says no ratio: give ratio="),
        (lambda: MaskedLinear(8, 4, pattern="2:4", ratio=0.75), ConfigError, "ratio=0.75 contradicts 2:4"),
        (lambda: MaskedLinear(8, 4, pattern="2:4", update_freq=-1), ConfigError, "update_freq must be None or.*got -1"),
        (lambda: MaskedLinear(8, 4, pattern="2:4", update_freq=True), ConfigError, "update_freq.*got True"),
        (lambda: MaskedLinear(8, 4, pattern="2:4", gradient="sr-ste"), ConfigError, "did you mean 'sr_ste'"),
        (lambda: MaskedLinear(8, 4, pattern="2:4", decay=-1.0), ConfigError, "decay must be a number >= 0, got -1.0"),
        (lambda: MaskedLinear(8, 4, pattern="2:4", regrow=float("nan")), ConfigError, "regrow must be a number >= 0"),
        (lambda: MaskedLinear(8, 4, pattern="2:4", schedule="agp"), ConfigError, "schedule must be one of"),
        (
            lambda: MaskedLinear(8, 4, pattern="2:4", schedule=LinearSchedule(start=0.5, end=0.2)),
            ConfigError,
            "schedule from 0.5 to 0.2: masks grow",
        ),
        (lambda: MaskedLinear(2, 4, pattern="2:4"), ConfigError, "this Linear: 2 input channels: 2:4 would remove"),
        (
            lambda: MaskedConv2d.from_float(nn.Conv2d(4, 4, 1, groups=2), pattern=Block(cin=1, cout=1, ratio=0.5)),
            ConfigError,
            "weight of this Conv2d: it has 2 groups: blocks run over all input channels.*leave the layer plain",
        ),
        (lambda: MaskedLinear(8, 4, pattern="2:4").step(), ConfigError, "mask has no schedule"),
        (
            lambda: MaskedLinear(8, 4, pattern="2:4").set_mask(torch.ones(2, 2)),
            ConfigError,
            r"the mask of weight is \(4, 8\), got \(2, 2\)",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@kinds
def test_on_the_meta_device(kind: str) -> None:
    cls, plain = plain_of(kind, device="meta")
    for pattern in ("2:4", Unstructured(0.5)):
        scheduled = cls.from_float(plain, pattern=pattern, update_freq=1, schedule=LinearSchedule(end=0.5))
        assert scheduled(torch.empty(KINDS[kind][2], device="meta")).is_meta
        masked = cls.from_float(plain, pattern=pattern, update_freq=1)
        assert {buffer.device.type for buffer in masked.buffers()} == {"meta"}
        assert cls(*KINDS[kind][1], pattern=pattern, device="meta").weight_mask.is_meta
    real = cls(*KINDS[kind][1], pattern="2:4", update_freq=1)
    masked.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(KINDS[kind][2])
    assert torch.equal(masked.eval()(x), real.eval()(x))


@kinds
def test_a_layer_is_on_the_device_of_its_parameters(kind: str, device: torch.device) -> None:
    layer = KINDS[kind][0](*KINDS[kind][1], pattern="2:4", update_freq=1, regrow=0.1, device=device)
    assert {state.device.type for state in layer.state_dict().values()} == {device.type}
    layer(torch.randn(KINDS[kind][2], device=device)).sum().backward()
    assert {state.device.type for state in layer.state_dict().values()} == {device.type}


@kinds
def test_copies_and_files(kind: str, tmp_path) -> None:
    cls, arguments, shape = KINDS[kind]
    layer = cls(*arguments, pattern="2:4", update_freq=2, regrow=0.1, schedule=LinearSchedule(end=0.5, steps=4))
    x = torch.randn(shape)
    layer(x).sum().backward()
    layer.step()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    fresh = cls(*arguments, pattern="2:4", update_freq=2, regrow=0.1, schedule=LinearSchedule(end=0.5, steps=4))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        layer.weight_mask.logical_not_()
        others = (copy.deepcopy(layer), torch.load(buffer, weights_only=False), fresh)
        others[0].weight_mask.logical_not_()
    for other in others:
        assert type(other) is cls
        assert other.mask_settings == layer.mask_settings
        assert int(other.num_mask_steps) == int(other.num_mask_batches) == 1
        assert torch.equal(other.weight_mask, ~layer.weight_mask)
        assert torch.equal(other.weight_gradient, layer.weight_gradient)
        want = plain_twin(other)(x)
        other(x).sum().backward()
        assert torch.equal(other.eval()(x), want)


def test_the_constructor_takes_every_setting() -> None:
    layer = MaskedLinear(
        8, 4, bias=False, pattern="unstructured", ratio=0.5, update_freq=3, gradient="sr_ste", decay=0.1, regrow=0.2,
        schedule=LinearSchedule(end=1 / 2, steps=2),
    )  # fmt: skip
    plain = MaskedLinear.from_float(
        nn.Linear(8, 4), pattern="unstructured", ratio=0.5, update_freq=3, gradient="sr_ste", decay=0.1, regrow=0.2,
        schedule=LinearSchedule(end=1 / 2, steps=2),
    )  # fmt: skip
    assert layer.mask_settings == plain.mask_settings
    assert layer.mask_settings.from_dict(layer.mask_settings.to_dict()) == layer.mask_settings


def test_attention_goes_there_and_back() -> None:
    plain = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    masked = MaskedMultiheadAttention.from_float(plain, pattern="2:4")
    assert masked.weight_names == ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    assert masked.out_proj is plain.out_proj
    again = masked.to_float()
    assert type(again) is nn.MultiheadAttention
    assert again.k_proj_weight.count_nonzero() == 8 * 4
    assert repr(masked).splitlines()[1] == "  pattern=2:4"
    inside = fxslim.sparsify(nn.Sequential(nn.MultiheadAttention(8, 2)), "2:4")[0]
    again = inside.to_float()
    assert type(again.out_proj) is type(plain.out_proj)
    assert set(vars(again.out_proj)) == set(vars(plain.out_proj))
    assert again.out_proj.weight.count_nonzero() == 32
