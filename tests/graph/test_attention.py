# SPDX-License-Identifier: Apache-2.0
"""Attention in the ways that people write it: whole heads are pruned, scales stay, proof holds."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxslim
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import randomise

X = torch.randn(2, 10, 8)


class Attention(nn.Module):
    def __init__(self, dim: int, way: str) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim, self.width, self.way = 4, 2, dim // 4, dim, way
        self.scale = self.head_dim**-0.5
        self.qkv, self.q, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim if "grouped" in way else 2 * dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        heads, width, way = self.num_heads, self.head_dim, self.way
        if way == "fused":
            return self.qkv(x).reshape(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if way == "chunk":
            return tuple(t.view(b, n, heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if way == "split":
            return tuple(t.view(b, n, heads, width).transpose(1, 2) for t in self.qkv(x).split(self.width, dim=2))
        if "grouped" in way:
            q = self.q(x).view(b, n, heads, width).transpose(1, 2)
            k, v = self.kv(x).view(b, n, 2, self.kv_heads, width).permute(2, 0, 3, 1, 4)
            repeats = heads // self.kv_heads
            if way == "grouped":
                return q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            shape = (b, self.kv_heads, repeats, n, width)
            k, v = (t[:, :, None].expand(*shape).reshape(b, heads, n, width) for t in (k, v))
            return q, k, v
        q, k, v = self.qkv(x).view(b, n, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        if way == "rotary":
            angles = torch.arange(n, dtype=x.dtype)[:, None] * torch.arange(width, dtype=x.dtype)
            q, k = (t * angles.cos() + _turned(t) * angles.sin() for t in (q, k))
        if way == "normed":
            q, k = F.layer_norm(q, (width,)), F.normalize(k, dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.split(x)
        if self.way == "sdpa":
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.way == "einsum":
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(self.scale).softmax(-1)
            return self.proj(torch.einsum("bhnm,bhmd->bnhd", scores, v).reshape(b, n, -1))
        scores = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(b, n, -1))


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Transformer(nn.Module):
    def __init__(self, way: str, dim: int = 32) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(8, dim), nn.Parameter(torch.randn(1, 10, dim))
        attention = nn.MultiheadAttention(dim, 4, batch_first=True) if way == "module" else Attention(dim, way)
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.up, self.down, self.head = nn.Linear(dim, 64), nn.Linear(64, dim), nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.positions[:, : x.shape[1]]
        y = self.norm1(x)
        y = self.attention(y, y, y)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(y)
        x = x + y
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


WAYS = ["fused", "chunk", "split", "grouped", "grouped by expand", "rotary", "normed", "sdpa", "einsum", "module"]


def heads_first(group, model):
    """Heads go before the channels of other layers."""
    return torch.arange(len(group)) / len(group) + (not any("attention" in name for name in group.layers("producer")))


@pytest.mark.parametrize("way", WAYS)
def test_whole_heads_go(way: str) -> None:
    model = randomise(Transformer(way))
    plan = fxslim.plan_pruning(model, X, ratio=0.5, importance=heads_first)
    graph = fxslim.trace(model, X)
    assert list(graph.frozen_layers()) == ["head"], graph.report()
    proof = plan.verify(model, [X, torch.randn(1, 7, 8)])
    assert proof.ok, str(proof)
    assert proof.relative <= TOLERANCE
    heads = {str(new.attribute): new.after for new in plan.new_sizes}
    assert heads["attention.num_heads"] < 4
    plan.apply(model).train()
    model(X).sum().backward()


def test_heads_written_as_a_number_stay() -> None:
    class Literal(Attention):
        def split(self, x: Tensor) -> tuple[Tensor, ...]:
            b, n, c = x.shape
            return self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)

    model = Transformer("fused")
    model.attention = Literal(32, "fused")
    graph = fxslim.trace(randomise(model), X)
    assert "reshape(2, 10, 3, 4, 8) at test_attention.py" in graph.explain("attention.qkv")
    assert "does not follow" in graph.explain("embed")
    assert fxslim.plan_pruning(model, X, ratio=0.2, importance="random").verify(model, X).ok


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def tiny_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_vision_transformers(build) -> None:
    model, x = randomise(build()), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model.head.weight.normal_() if hasattr(model, "head") else model.heads.head.weight.normal_()
    plan = fxslim.plan_pruning(model, x, ratio=0.4, importance="random")
    graph = fxslim.trace(model, x)
    assert all(why.startswith("model output") for why in graph.frozen_layers().values()), graph.report()
    proof = plan.verify(model, x)
    assert proof.ok, str(proof)
    assert proof.relative <= TOLERANCE
    assert any(new.attribute.name == "num_heads" for new in plan.new_sizes)
    plan.apply(model).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin])
def test_macs_of_attention_agree_with_torch(build) -> None:
    model, x = build().eval(), torch.randn(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        model(x)
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert fxslim.trace(model, x).cost.macs == counter.get_total_flops() // 2


def test_operands_with_different_channels_stay() -> None:
    class Meet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 10), nn.Linear(8, 2), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.a(x).transpose(1, 2)[:2]  # channels are rows
            batch = self.b(x).permute(2, 1, 0)  # channels are the batch
            return self.head(torch.bmm(rows, batch).transpose(1, 2))

    model = randomise(Meet())
    graph = fxslim.trace(model, X)
    assert "different channels" in graph.explain("a")
    assert "different channels" in graph.explain("b")


def test_a_mask_takes_as_many_dims_as_it_has() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(x))))[torch.ones(2, 10, dtype=torch.bool)])

    model = randomise(Masked())
    plan = fxslim.plan_pruning(model, X, ratio=0.4, importance="random", max_ratio=0.5)
    assert {"b.weight", "head.weight"} <= {cut.name for cut in plan.cuts}
    assert plan.verify(model, X).ok

    class OverChannels(Masked):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.b(torch.relu(self.a(x))))
            return self.head(hidden[torch.ones(2, 10, 10, dtype=torch.bool)].reshape(2, 10, 10))

    graph = fxslim.trace(OverChannels(), X)
    assert "channels are picked by indices" in graph.explain("b"), graph
