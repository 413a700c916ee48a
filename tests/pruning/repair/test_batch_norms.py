# SPDX-License-Identifier: Apache-2.0
"""Statistics estimated anew are those computed by hand, of the layers behind a change and of no others."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.errors import CalibrationError, ConfigError
from fxslim.pruning.repair.batch_norms import reestimate_batch_norms
from tests.pruning.repair.oracles import error, pruned
from tests.pruning.small_models import assert_unchanged, snapshot


def with_norms() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def images(num: int = 3, size: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 2, 8, 8, generator=generator) * 2 + 1 for _ in range(num)]


def trained() -> nn.Sequential:
    """With the statistics that its data have."""
    model = with_norms()
    reestimate_batch_norms(model, images())
    return model


def test_statistics_are_those_of_torchs_own_update() -> None:
    model, wanted = with_norms(), with_norms()
    wanted[3].p = 0
    torch.optim.swa_utils.update_bn(images(), wanted)
    random = torch.get_rng_state()
    assert reestimate_batch_norms(model.train(), images()) == ["1", "5"]
    assert torch.equal(random, torch.get_rng_state())
    for name in ("1", "5"):
        found, by_torch = model.get_submodule(name), wanted.get_submodule(name)
        torch.testing.assert_close(found.running_mean, by_torch.running_mean)
        torch.testing.assert_close(found.running_var, by_torch.running_var)
        assert int(found.num_batches_tracked) == 3
        assert found.training
    assert (model[1].momentum, model[5].momentum) == (0.1, None)


def test_the_pruned_models_statistics_by_hand() -> None:
    model = trained()
    plan = fxslim.plan_pruning(model, images()[0], repair="bn", data=images())
    repaired = plan.apply(copy.deepcopy(model)).eval()
    means, variances = [], []
    with torch.no_grad():
        for x in images():
            first = repaired[0](x)
            mean, variance = first.mean((0, 2, 3)), first.var((0, 2, 3), correction=0)
            scale = repaired[1].weight / (variance + repaired[1].eps).sqrt()
            y = (first - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + repaired[1].bias.view(1, -1, 1, 1)
            second = repaired[4](y.relu())
            means.append(second.mean((0, 2, 3)))
            variances.append(second.var((0, 2, 3)))
    torch.testing.assert_close(repaired[5].running_mean, sum(means) / 3, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(repaired[5].running_var, sum(variances) / 3, rtol=1e-4, atol=1e-5)
    plain = pruned(model, images()[0], None, None)
    assert error(repaired, model, images()) < error(plain, model, images())


class Branches(nn.Module):
    """The norms of one branch are beside every change; a written one is behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.wide, self.inner, self.back = nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)
        self.after, self.beside = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        side = torch.zeros_like(x)
        side[:, :4].add_(self.after(self.back(self.inner(self.wide(x)).relu())))
        return self.fc(self.last(side + self.beside(x)).mean((2, 3)))


def test_norms_beside_every_change_stay_as_they_are() -> None:
    model = Branches()
    plan = fxslim.plan_pruning(
        model, images()[0], ratio=0.3, target="channels", skip=["stem", "back", "beside"], repair="bn", data=images()
    )
    assert {cut.name.partition(".")[0] for cut in plan.cuts} == {"wide", "inner", "back"}
    before = copy.deepcopy(dict(model.named_buffers()))
    plan.apply(model)
    changed = {
        name.partition(".")[0]
        for name, value in model.named_buffers()
        if value.shape != before[name].shape or not torch.equal(value, before[name])
    }
    assert changed == {"inner", "after", "last"}


def test_frozen_norms_and_norms_without_statistics_are_left_and_told() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    model.train()
    model[1].eval()
    model[5].requires_grad_(False)
    plan = fxslim.plan_pruning(model, images()[0], repair="bn", data=images())
    assert {note.split(":")[1] for note in plan.notes if "it is frozen" in note} == {" 1", " 3", " 5"}
    plan.apply(model)
    assert not model[1].running_mean.any()
    assert not model[5].running_mean.any()
    assert model[7].running_mean.all()
    assert [m.training for m in model[1:8:2]] == [False, True, True, True]


def test_layers_are_chosen_by_name() -> None:
    model = with_norms()
    assert reestimate_batch_norms(model, images(), layers=["5"]) == ["5"]
    assert not model[1].running_mean.any()
    with pytest.raises(ConfigError, match=r"layers: unknown batch norm that keeps statistics '4'.*known: 1, 5"):
        reestimate_batch_norms(model, images(), layers=["4"])


def failing(good: int) -> list[Tensor]:
    nan = images(1)[0]
    nan[0, 0, 0, 0] = torch.nan
    return [*images(good), nan]


@pytest.mark.parametrize(
    "data, message",
    [
        (failing(2), "1 reads NaN or infinity in batch 2 of data"),
        ([torch.randn(1, 2, 5, 5)], "5 reads 1 value of each channel in batch 0 of data"),
        ([], "data has no batches"),
        ([images()[0], torch.randn(4, 3, 8, 8)], "channels"),
    ],
)
def test_an_error_in_the_data_changes_nothing(data, message: str) -> None:
    for model in (with_norms(), with_norms().eval()):
        before = snapshot(model)
        with pytest.raises((CalibrationError, ConfigError, RuntimeError), match=message):
            reestimate_batch_norms(model, data)
        assert_unchanged(before, snapshot(model))
