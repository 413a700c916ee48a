# SPDX-License-Identifier: Apache-2.0
"""Models that hand weights to functions: the masks hold there too, and all else is as with other layers."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxslim
from fxslim import CheckpointError, PlanError, SparsityPlan
from fxslim.nn import HandedOverLinear, MaskedLinear, MaskedMultiheadAttention
from fxslim.patterns import check
from fxslim.sparsity import bake
from tests.sparsity.small_networks import HandsOver, window_net

OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear


def sequences(num: int = 4) -> Tensor:
    return torch.randn(num, 6, 8, generator=torch.Generator().manual_seed(1))


def stored(layer: nn.Module) -> nn.Parameter:
    return dict(layer.named_parameters())["weight"]


def masked_net(**wishes: Any) -> Any:
    return fxslim.sparsify(window_net(), "2:4", example_inputs=sequences(), **wishes)


def by_hand(model: nn.Module) -> nn.Module:
    """The plain model, zeros written into its state dict by hand."""
    plain, state = window_net(), model.state_dict()
    masks = {name: value for name, value in state.items() if name.endswith("_mask")}
    plain.load_state_dict(
        {name: value * masks.get(f"{name}_mask", 1) for name, value in state.items() if name in plain.state_dict()}
    )
    return plain


@pytest.mark.parametrize("method", ["magnitude", "wanda", "first_order", "hessian"])
@pytest.mark.parametrize("scope, pattern", [("layer", "2:4"), ("global", "unstructured"), ("adaptive", "unstructured")])
def test_computes_as_zeros_written_by_hand(method: str, scope: str, pattern: str) -> None:
    data = [(sequences(), torch.randint(0, 8, (4, 8)))] * 2
    model: Any = fxslim.sparsify(
        window_net(), pattern, method=method, scope=scope, data=data, forward=lambda net, batch: net(batch[0]),
        loss=lambda outputs, batch: outputs.square().mean(),
    )  # fmt: skip
    assert {type(m) for m in (model[1].attn.qkv, model[2].attn.proj)} == {HandedOverLinear}
    assert type(model[1].mlp[1]) is MaskedLinear
    assert not model[1].attn.qkv.weight_mask.all()
    torch.testing.assert_close(model(sequences()), by_hand(model)(sequences()))
    assert not torch.allclose(model(sequences()), window_net()(sequences()))
    assert torch.equal(bake(copy.deepcopy(model))(sequences()), model(sequences()))


def test_methods_that_look_at_data_break_less_there() -> None:
    x = sequences(64)
    errors = []
    for method in ("magnitude", "hessian"):
        model = fxslim.sparsify(window_net(), "2:4", method=method, data=[x], layers=["*.attn.qkv", "*.attn.proj"])
        with torch.no_grad():
            errors.append(float((model(x) - window_net()(x)).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_the_parameter_is_as_it_was() -> None:
    model = window_net()
    layer, weight, names = model[1].attn.qkv, model[1].attn.qkv.weight, list(dict(model.named_parameters()))
    fxslim.sparsify(model, "2:4", example_inputs=sequences())
    assert model[1].attn.qkv is layer
    assert stored(layer) is weight
    assert list(dict(model.named_parameters())) == names
    assert layer.weight is not weight
    assert torch.equal(layer.weight, torch.where(layer.weight_mask, weight, 0))
    assert torch.equal(model.state_dict()["1.attn.qkv.weight"], weight)
    assert check(layer, "2:4").ok
    torch.testing.assert_close(layer(torch.ones(1, 16)), F.linear(torch.ones(1, 16), layer.weight, layer.bias))


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Any] = {"deepcopy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("how", COPIES)
def test_copies_count_for_themselves(how: str) -> None:
    model = masked_net(update_freq=1)
    other = COPIES[how](model)
    torch.testing.assert_close(other(sequences()), model(sequences()))
    other.train()(sequences())
    assert int(other[1].attn.qkv.num_mask_batches) == 1
    assert int(model[1].attn.qkv.num_mask_batches) == 0


@pytest.mark.parametrize("assign", [False, True])
def test_states_are_loaded(assign: bool) -> None:
    model, other = masked_net(), masked_net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other[1].attn.qkv.set_mask(~other[1].attn.qkv.weight_mask)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert torch.equal(model(sequences()), other(sequences()))
    half = copy.deepcopy(model).double()
    torch.testing.assert_close(half(sequences().double()).float(), model(sequences()))
    assert model.half()[1].attn.qkv.weight.dtype == torch.half


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, x = window_net(), sequences()
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=x, update_freq=2)
    assert {one.name: one.user for one in plan.weights if one.user is not None} == {
        f"{block}.attn.{layer}.weight": f"{block}.attn" for block in (1, 2) for layer in ("qkv", "proj")
    }
    again = SparsityPlan.from_dict(plan.to_dict())
    assert again.weights == plan.weights
    plan.apply(model)
    assert torch.equal(again.apply(window_net())(x), model(x))
    model.train()(x)
    fxslim.save(model.eval(), tmp_path / "model.safetensors")
    loaded = fxslim.load(window_net(1), tmp_path / "model.safetensors").eval()
    assert torch.equal(loaded(x), model(x))
    loaded.train()(x)
    assert int(loaded[1].attn.qkv.num_mask_batches) == 2
    wrong = plan.to_dict() | {"users": {"1.attn.qkv.weight": "1.attention"}}
    with pytest.raises(PlanError, match=r"it has no module 1\.attention"):
        SparsityPlan.from_dict(wrong).apply(window_net())
    with pytest.raises(CheckpointError, match=r"it knows who uses nothing\.weight, which it does not mask"):
        SparsityPlan.from_dict(plan.to_dict() | {"users": {"nothing.weight": "1"}})
    # A wrapper's prefix is no difference.
    wrapped = nn.ModuleDict({"module": window_net()})
    SparsityPlan.from_dict(plan.to_dict()).apply(wrapped)
    assert torch.equal(wrapped["module"][1].attn.qkv.weight_mask, again.apply(window_net())[1].attn.qkv.weight_mask)


@pytest.mark.parametrize("order", ["prune, mask", "mask, prune", "mask, prune, bake", "mask, bake, prune"])
def test_pruned_and_masked_in_any_order(order: str, tmp_path: Any) -> None:
    model, x = window_net(), sequences()
    for step in order.split(", "):
        if step == "prune":
            plan = fxslim.plan_pruning(model, x, ratio=0.4)
            proof = plan.verify(model, x)
            assert proof.ok, proof
            plan.apply(model)
            assert model[1].attn.qkv.out_features < 48
        elif step == "mask":
            fxslim.sparsify(model, "2:4", example_inputs=x)
        else:
            before = model(x)
            bake(model)
            assert torch.equal(model(x), before)
            assert type(model[1].attn.qkv) is nn.Linear
            assert not any(module._forward_pre_hooks for module in model.modules())
    if type(model[1].attn.qkv) is HandedOverLinear:
        assert model[1].attn.qkv.weight_mask.shape == stored(model[1].attn.qkv).shape
    fxslim.save(model, tmp_path / "model.safetensors")
    loaded = fxslim.load(window_net(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("gradient", ["zero", "sr_ste"])
@pytest.mark.parametrize("again", [False, True])
def test_training_counts_batches_of_the_user(gradient: str, again: bool) -> None:
    """Gradient checkpointing repeats forwards without counting."""
    model = masked_net(update_freq=2, gradient=gradient, regrow=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-2)
    layers = [model[1].attn.qkv, model[2].attn.proj, model[1].mlp[1]]
    seen = [set[bytes]() for _ in layers]
    for batch in range(1, 7):
        optimizer.zero_grad()
        x = sequences().requires_grad_()
        outputs = checkpoint(model, x, use_reentrant=False) if again else model(x)
        outputs.square().sum().backward()
        for layer, masks in zip(layers, seen, strict=True):
            assert int(layer.num_mask_batches) == batch
            assert check(layer.weight.detach() if layer is not layers[2] else layer, "2:4").ok
            masks.add(layer.weight_mask.numpy().tobytes())
            gradients = stored(layer).grad[~layer.weight_mask]
            assert (gradients == 0).all() == (gradient == "zero")
        optimizer.step()
    assert all(1 < len(masks) <= 3 for masks in seen)


def test_optimizers_forget_what_is_masked() -> None:
    model = window_net()
    optimizer = torch.optim.Adam(model.parameters())
    model(sequences()).sum().backward()
    optimizer.step()
    fxslim.sparsify(model, "2:4", example_inputs=sequences(), optimizer=optimizer)
    layer: Any = model[1].attn.proj
    momentum = optimizer.state[stored(layer)]["exp_avg"]
    assert not momentum[~layer.weight_mask].any()
    assert momentum[layer.weight_mask].any()


def test_progressive_stages_and_schedules() -> None:
    model = masked_net(method="hessian", progressive=2, data=[sequences(32)])
    assert check(model[1].attn.qkv.weight.detach(), "2:4").ok
    schedule = fxslim.schedules.LinearSchedule(end=0.5, steps=2)
    model = masked_net(schedule=schedule)
    ratios = []
    for _ in range(2):
        fxslim.sparsity.step_masks(model)
        ratios.append(float((model[1].attn.qkv.weight == 0).float().mean()))
    assert ratios == [0.25, 0.5]


def test_the_model_itself_is_a_user() -> None:
    model = fxslim.sparsify(HandsOver(), "2:4", example_inputs=torch.randn(2, 8), update_freq=0)
    model.train()(torch.randn(2, 8))
    assert [int(layer.num_mask_batches) for layer in (model.first, model.second)] == [1, 1]


class ReadsBoth(nn.Module):
    """Calls a layer, and uses its weight a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.layer.weight + torch.einsum("bi,oi->bo", x, self.layer.weight)


def test_layers_that_are_called_too_count_their_own_forwards() -> None:
    model, x = ReadsBoth(), torch.randn(3, 8)
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=x, update_freq=1)
    assert plan.weights[0].user == "layer"
    plan.apply(model)
    found = model.train()(x)
    assert int(model.layer.num_mask_batches) == 1
    weight = stored(model.layer) * model.layer.weight_mask
    torch.testing.assert_close(found, F.linear(x, weight, model.layer.bias) @ weight + x @ weight.T)


class AttentionPool(nn.Module):
    """As CLIP's: all four layers go to torch's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.c = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, None, torch.cat([self.q.bias, self.k.bias, self.v.bias]), None, None, False, 0.0,
            self.c.weight, self.c.bias, use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )[0]  # fmt: skip


class OwnAttention(nn.MultiheadAttention):
    """A subclass of torch's layer."""


@pytest.mark.parametrize("seen", [False, True])
def test_out_proj_of_a_subclass_is_read_by_its_owner(seen: bool) -> None:
    x = torch.randn(5, 2, 8)
    model: Any = nn.ModuleDict({"attn": OwnAttention(8, 2)})
    examples = fxslim.Inputs(x, x, x) if seen else None
    plan = fxslim.plan_sparsity(model.attn, "2:4", example_inputs=examples)
    assert [(one.name, one.user) for one in plan.weights] == [("out_proj.weight", "")]
    plan.apply(model.attn)
    whole = model.attn(x, x, x)[0]
    assert type(bake(model.attn).out_proj) is OUT_PROJ
    assert torch.equal(model.attn(x, x, x)[0], whole)
    assert check(model.attn.out_proj, "2:4").ok


def test_attention_pools_and_torchs_own_attention() -> None:
    pool, x = AttentionPool(), torch.randn(5, 2, 8)
    plan = fxslim.plan_sparsity(pool, "2:4", example_inputs=x)
    assert {one.user for one in plan.weights} == {""}
    found = plan.apply(pool)(x)
    assert torch.equal(bake(pool)(x), found)
    own: Any = nn.MultiheadAttention(8, 2)
    plan = fxslim.plan_sparsity(own, "2:4", example_inputs=fxslim.Inputs(x, x, x))
    assert [one.user for one in plan.weights] == [None, None]
    assert type(plan.apply(own)) is MaskedMultiheadAttention
    assert type(own.out_proj) is MaskedLinear


def test_baking_a_part_leaves_its_user_working() -> None:
    model = masked_net(update_freq=1)
    before = model(sequences())
    bake(model[1].attn.qkv)
    assert torch.equal(model(sequences()), before)
    model.train()(sequences())
    assert type(model[1].attn.qkv) is nn.Linear
    assert int(model[1].attn.proj.num_mask_batches) == 1
    bake(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["swin_t", "swin_v2_t"])
@pytest.mark.parametrize("seen", [False, True])
def test_swin(kind: str, seen: bool) -> None:
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(1, 3, 32, 32)
    model = getattr(models, kind)().eval()
    with torch.no_grad():
        plan = fxslim.plan_sparsity(model, "2:4", example_inputs=x if seen else None, ineligible="ignore")
        users = {one.name: one.user for one in plan.weights if one.user is not None}
        assert len(users) == 24
        assert users["features.1.0.attn.qkv.weight"] == "features.1.0.attn"
        plan.apply(model)
        found = model(x)
        assert all(result.ok for result in plan.check(model).values())
        assert torch.equal(bake(model)(x), found)
        assert check(model.features[1][0].attn.qkv.weight, "2:4").ok


class ReadsElsewhere(nn.Module):
    """Uses the weight of a layer that is no part of it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.inner, self.elsewhere = nn.Linear(8, 8), [layer]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.elsewhere[0].weight)


def test_layers_elsewhere_go_on_where_their_user_is_baked() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    model: Any = nn.Sequential(ReadsElsewhere(layer), nn.Identity())
    model[1].layer = layer
    plan = fxslim.plan_sparsity(model, "2:4", example_inputs=x, update_freq=1)
    assert {one.name: one.user for one in plan.weights} == {"0.inner.weight": None, "1.layer.weight": "0"}
    plan.apply(model)
    bake(model[0])
    assert type(model[0].inner) is nn.Linear
    model.train()(x)
    assert int(layer.num_mask_batches) == 1
