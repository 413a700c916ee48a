# SPDX-License-Identifier: Apache-2.0
"""Norms of every kind, with and without parameters and running statistics."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

import fxslim
from tests.graph.proofs import Rows, check_family, picture, randomise, stays

SHAPES = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def around(dims: int, *middle: nn.Module, channels: int = 12) -> nn.Sequential:
    conv = CONVS[dims]
    return nn.Sequential(conv(3, channels, 3, padding=1), *middle, nn.Tanh(), conv(channels, 4, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_instance_norm(dims: int, affine: bool, tracked: bool) -> None:
    norm = INSTANCE_NORMS[dims](12, affine=affine, track_running_stats=tracked)
    model = check_family(around(dims, norm), torch.randn(2, 3, *SHAPES[dims]), prunes="0")
    assert norm.num_features == model[0].out_channels < 12


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm(dims: int, affine: bool, tracked: bool) -> None:
    norm = BATCH_NORMS[dims](12, affine=affine, track_running_stats=tracked)
    model = check_family(around(dims, norm), torch.randn(2, 3, *SHAPES[dims]), prunes="0")
    assert norm.num_features == model[0].out_channels < 12


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_vectors(affine: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12, affine=affine), nn.ReLU(), nn.Linear(12, 3))
    check_family(model, torch.randn(4, 5), prunes="0")


def test_synchronised_batch_norm() -> None:
    check_family(around(2, nn.SyncBatchNorm(12)), picture(), prunes="0")


def test_frozen_batch_norm() -> None:
    model = check_family(around(2, FrozenBatchNorm2d(12)), picture(), prunes="0")
    assert model[1].running_var.shape == (model[0].out_channels,)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(seed: int, affine: bool) -> None:
    groups, width = random.Random(seed).choice([(1, 12), (2, 6), (3, 4), (4, 3), (6, 4)])
    norm = nn.GroupNorm(groups, groups * width, affine=affine)
    dims = 1 + seed % 3
    model = around(dims, nn.Sigmoid(), norm, channels=groups * width)
    check_family(model, torch.randn(2, 3, *SHAPES[dims]), prunes="0", ratio=0.3, seed=seed)
    assert norm.num_channels == model[0].out_channels < groups * width


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_the_last_dim(kind: type, affine: bool) -> None:
    norm = kind(12, elementwise_affine=affine)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), Rows(), nn.Sigmoid(), norm, nn.Linear(12, 4))
    check_family(model, picture(), prunes="0")
    assert norm.normalized_shape == (model[-1].in_features,)
    assert model[-1].in_features < 12


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_over_channels_and_pixels(kind: type, affine: bool, dims: int) -> None:
    norm = kind((12, *SHAPES[dims]), elementwise_affine=affine)
    model = check_family(around(dims, nn.Sigmoid(), norm), torch.randn(2, 3, *SHAPES[dims]), prunes="0")
    assert norm.normalized_shape == (model[0].out_channels, *SHAPES[dims])


@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_pixels_only(affine: bool) -> None:
    norm = nn.LayerNorm((6, 5), elementwise_affine=affine)
    check_family(around(2, norm), torch.randn(2, 3, 6, 5), prunes="0")
    assert norm.normalized_shape == (6, 5)


def test_norm_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.end = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
            self.norm = nn.LayerNorm(12, elementwise_affine=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(torch.relu(self.norm(self.a(x))) * torch.sigmoid(self.norm(self.b(x))))

    check_family(Twice(), torch.randn(4, 5), prunes="a b")


def test_norm_functions_without_weight_stay() -> None:
    class Functional(nn.Module):
        def __init__(self, norm) -> None:
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3), norm

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(self.norm(self.a(x)))))

    for norm in (lambda x: F.layer_norm(x, (12,)), lambda x: F.rms_norm(x, (12,)), lambda x: F.group_norm(x, 3)):
        stays(Functional(norm), torch.randn(4, 5), "a", "without a weight and outside")


def test_a_plan_with_such_norms_is_saved_and_has_their_names(tmp_path) -> None:
    def build() -> nn.Module:
        return randomise(
            around(2, nn.GroupNorm(3, 12, affine=False), nn.LayerNorm((12, 6, 5), elementwise_affine=False))
        )

    x = torch.randn(2, 3, 6, 5)
    plan = fxslim.plan_pruning(build(), x, ratio=0.3)
    assert {"1.num_channels", "2.normalized_shape"} < {cut.name for cut in plan.cuts}
    plan.save(tmp_path / "plan.json")
    wrapped = nn.Sequential()
    wrapped.add_module("module", build())
    loaded = fxslim.load_plan(tmp_path / "plan.json")
    assert loaded.verify(wrapped, x).ok
    loaded.apply(wrapped)
    assert wrapped.module[1].num_channels == wrapped.module[2].normalized_shape[0] == wrapped.module[0].out_channels
