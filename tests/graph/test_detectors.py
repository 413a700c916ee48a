# SPDX-License-Identifier: Apache-2.0
"""Detectors: pyramids, proposals, regions and boxes chosen by score, pruned and proved in both modes."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.ops import FrozenBatchNorm2d, batched_nms, roi_align

import fxslim
from fxslim.errors import ConfigError, TraceError
from fxslim.graph.rules import indexing
from fxslim.pruning.decisions import RepeatedDecisions
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import randomise
from tests.graph.test_mutations import Patch, changed_result, rolled_channels, without_slot

RAW = ("score", "move", "kind", "shape")


class SmallDetector(nn.Module):
    """Two levels, proposals by score, regions of either level, boxes of several kinds that do not overlap."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        pick = random.Random(seed).choice
        wide, self.size = pick([6, 8, 12]), pick([2, 3])
        norm = pick([nn.BatchNorm2d, FrozenBatchNorm2d])
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(8, 10, 3, stride=2, padding=1), norm(10), nn.ReLU())
        self.inner = nn.ModuleList([nn.Conv2d(8, wide, 1), nn.Conv2d(10, wide, 1)])
        self.outer = nn.ModuleList([nn.Conv2d(wide, wide, 3, padding=1) for _ in range(2)])
        hidden, heads = pick([5, 9]), pick([1, 2])
        towers = [nn.Sequential(nn.Conv2d(wide, hidden, 3, padding=1), nn.ReLU()) for _ in range(heads)]
        self.towers = nn.ModuleList([towers[0], towers[-1]])
        self.score, self.move = nn.Conv2d(hidden, 1, 1), nn.Conv2d(hidden, 4, 1)
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(wide * self.size**2, 11), nn.ReLU())
        self.kind, self.shape = nn.Linear(11, 4), nn.Linear(11, 4)
        self.by_mask, self.pools_both = pick([True, False]), pick([True, False])

    def proposals(self, level: Tensor, tower: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        """The best places of each image, as boxes."""
        hidden = tower(level)
        scores = self.score(hidden).flatten(1)
        moves = self.move(hidden).permute(0, 2, 3, 1).reshape(len(scores), -1, 4)
        best, places = scores.topk(min(6, scores.shape[1]), dim=1)
        height, width = level.shape[-2:]
        ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres = torch.stack([xs, ys], 2).reshape(-1, 2)[places] * float(step)
        chosen = moves[torch.arange(len(scores))[:, None], places]
        low = centres + chosen[..., :2].tanh()
        return torch.cat([low, low + 2 + chosen[..., 2:].sigmoid() * 6], 2), best

    def regions(self, levels: list[Tensor], rois: Tensor) -> Tensor:
        if not self.pools_both:
            return roi_align(levels[0], rois, self.size, 1.0, 2)
        big = torch.floor(torch.log2((rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt() / 4)).clamp(0, 1).to(torch.int64)
        found = torch.zeros(len(rois), levels[0].shape[1], self.size, self.size, dtype=rois.dtype)
        for i, level in enumerate(levels):
            where = big == i if self.by_mask else torch.where(big == i)[0]
            found[where] = roi_align(level, rois[where], self.size, 1 / 2**i, 2)
        return found

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        top, left = (max(image.shape[d] for image in images) for d in (1, 2))
        x = torch.stack([F.pad(i, (0, left - i.shape[2], 0, top - i.shape[1])) for i in images])
        first = self.stem(x)
        low, high = self.inner[0](first), self.inner[1](self.deep(first))
        low = low + F.interpolate(high, size=low.shape[-2:])
        levels = [outer(level) for outer, level in zip(self.outer, (low, high), strict=True)]
        found = map(self.proposals, levels, self.towers, (1, 2))
        boxes, scores = (torch.cat(values, 1) for values in zip(*found, strict=True))
        keep = [batched_nms(b, s, torch.zeros(len(b)), 0.6)[:5] for b, s in zip(boxes, scores, strict=True)]
        chosen = [b[k] for b, k in zip(boxes, keep, strict=True)]
        rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(chosen)])
        hidden = self.box(self.regions(levels, rois))
        kinds, shapes = self.kind(hidden), rois[:, 1:] + self.shape(hidden)
        if self.training:
            if targets is None:
                raise ValueError("targets are needed")
            taken = [torch.randint(len(target["boxes"]), (len(k),)) for target, k in zip(targets, keep, strict=True)]
            wanted = torch.cat([target["boxes"][k] for target, k in zip(targets, taken, strict=True)])
            return {"box": (shapes - wanted).abs().mean(), "kind": kinds.logsumexp(1).mean()}
        results, start = [], 0
        for k in keep:
            certain, labels = kinds[start : start + len(k)].softmax(1).max(1)
            mine, start = shapes[start : start + len(k)], start + len(k)
            final = torch.nonzero(certain > 0.3).squeeze(1)
            results.append({"boxes": mine[final], "labels": labels[final], "scores": certain[final]})
        return results


def example(seed: int, targets: bool = False) -> tuple:
    torch.manual_seed(seed)
    images = [torch.randn(3, 12, 16), torch.randn(3, 14, 11)]
    return (images, [{"boxes": torch.rand(3, 4) * 10} for _ in images]) if targets else (images,)


def detector(seed: int) -> nn.Module:
    return randomise(SmallDetector(seed), seed)


def planned(seed: int) -> tuple[nn.Module, fxslim.PruningPlan]:
    model = detector(seed)
    settings = {"ratio": 0.4, "importance": "random", "seed": seed, "train_inputs": example(seed, targets=True)}
    return model, fxslim.plan_pruning(model, example(seed), **settings)


@pytest.mark.parametrize("seed", range(8))
def test_a_detector_is_pruned_and_proved_in_both_modes(seed: int) -> None:
    model, plan = planned(seed)
    graph = fxslim.trace(model, example(seed), train_inputs=example(seed, targets=True))
    assert set(graph.frozen_layers()) == set(RAW), graph
    proof = plan.verify(model, example(seed + 1), at=RAW, train_inputs=example(seed + 2, targets=True))
    assert proof.ok, proof
    assert "decisions" in proof.notes[-1]
    assert "4 outputs of score" in proof.notes[-1]
    plan.apply(model).eval()(*example(seed))
    sum(model.train()(*example(seed, targets=True)).values()).backward()


def no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RepeatedDecisions, "__torch_dispatch__", lambda s, f, t, a=(), k=None: f(*a, **(k or {})))


def indices_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written values are taken for those that were there: nothing is unified."""
    monkeypatch.setattr(indexing, "combined", lambda propagation, node, operands, shape: operands[0])


FAULTS: dict[str, Patch] = {
    "regions shifted": changed_result("roi_align", change=rolled_channels),
    "places written shifted": changed_result("index_put", change=rolled_channels),
    "written values ignored": indices_ignored,
    "frozen norm forgotten": without_slot("running_var"),
    "box head forgotten": without_slot("box.1.weight", role="consumer"),
    "heads forgotten": without_slot("score.weight", role="consumer"),
}


def differs(seed: int) -> bool:
    try:
        model, plan = planned(seed)
    except (fxslim.PlanError, IndexError, ValueError, KeyError, RuntimeError):
        return False
    return plan.verify(model, example(seed)).relative > TOLERANCE


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    assert any(differs(seed) for seed in range(8)), name


class Best(nn.Module):
    """The best two of each channel, of which many are tied."""

    def __init__(self, sorts: bool) -> None:
        super().__init__()
        self.stem, self.head, self.sorts = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), sorts

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.stem(x)).flatten(2)
        best, places = rows.sort(dim=2) if self.sorts else rows.topk(2, 2)
        return self.head(best[..., -2:].sum(2) + 0.01 * places[..., -1].to(x.dtype))


@pytest.mark.parametrize("sorts", [True, False])
def test_each_channel_chooses_for_itself(sorts: bool) -> None:
    model, x = randomise(Best(sorts)), torch.randn(2, 3, 6, 6)
    plan = fxslim.plan_pruning(model, x, ratio=0.4, importance="random")
    assert plan.verify(model, x).ok
    plan.apply(model)(x)


class Chosen(nn.Module):
    """Scores that are all but equal decide which rows are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.value = nn.Linear(4, 12), nn.Linear(12, 2, bias=False), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(x))
        a, b = self.score(hidden).unbind(1)
        # Equal but for rounding, and rounding depends on how many terms a sum has.
        order = (a + b - a - b).argsort()
        return self.value(hidden)[order]


def test_near_ties_are_decided_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomise(Chosen()), torch.randn(40, 4)
    plan = fxslim.plan_pruning(model, x, ratio=0.4, target="channels", importance="random")
    outputs = plan.verify(model, x)
    no_replay(monkeypatch)
    assert plan.verify(model, x).relative > TOLERANCE
    assert outputs.notes


def test_modules_to_compare_are_named() -> None:
    model, plan = planned(0)
    with pytest.raises(ConfigError, match=r"at: unknown module 'scores'; did you mean 'score'"):
        plan.verify(model, example(0), at="scores")
    proof = plan.verify(model, example(0), at=["stem"])
    assert not proof.ok
    assert any("output shapes of stem differ" in note for note in proof.notes)


def test_training_that_needs_other_inputs_says_so() -> None:
    graph = fxslim.trace(detector(0), example(0))
    assert any("train_inputs=" in note for note in graph.notes)
    with pytest.raises(TraceError, match=r"in train mode with .*ValueError: targets are needed"):
        fxslim.trace(detector(0), example(0), train_inputs=example(0))


def test_a_train_forward_that_fails_takes_everything_back() -> None:
    model, plan = planned(0)
    model.forward = lambda *args: SmallDetector.forward(model, args[0])  # type: ignore[method-assign]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TraceError, match="own forward fails on the plan's example inputs"):
        plan.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_without_entries_are_told() -> None:
    class Filtered(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = super().forward(x)
            return out, out[out[:, 0] > 1e9]

    model, x = randomise(Filtered(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))), torch.randn(4, 3)
    proof = fxslim.plan_pruning(model, x, ratio=0.4, importance="random").verify(model, x)
    assert proof.ok
    assert any("has no entries" in note for note in proof.notes)


def test_a_real_detector() -> None:
    torch.manual_seed(0)
    settings = {"min_size": 64, "max_size": 80, "box_score_thresh": 0.0, "num_classes": 3, "box_detections_per_img": 5}
    settings |= {"rpn_post_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8}
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, **settings)
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 60)]
    targets = [{"boxes": torch.tensor([[5.0, 6.0, 40.0, 45.0]]), "labels": torch.tensor([1])} for _ in images]
    plan = fxslim.plan_pruning(model, (images,), train_inputs=(images, targets), importance="random")
    heads = ("rpn.head.*_*", "roi_heads.box_predictor.*")
    proof = plan.verify(model, (images,), at=heads, train_inputs=(images, targets))
    assert proof.ok, proof
    cut = {c.name for c in plan.cuts if c.role == "producer"}
    assert {"rpn.head.conv.0.0.weight", "roi_heads.box_head.fc6.weight", "backbone.fpn.layer_blocks.0.0.weight"} <= cut
    plan.apply(model)
    model.eval()(images)
    sum(model.train()(images, targets).values()).backward()


class Masked(nn.Module):
    """Places of all channels are chosen by a mask of pixels, entries of one channel by their own value."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.stem, self.head, self.whole = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), whole

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).permute(0, 2, 3, 1).clone()
        if self.whole:
            y[y < 0.1] = 0.2
        return self.head(y[x[:, 0, 1:-1, 1:-1] > 0])


@pytest.mark.parametrize("whole", [True, False])
def test_masks_of_several_dims(whole: bool) -> None:
    model, x = randomise(Masked(whole)), torch.randn(2, 3, 6, 6)
    plan = fxslim.plan_pruning(model, x, ratio=0.4, importance="random")
    assert plan.verify(model, [x, torch.randn(1, 3, 9, 7)]).ok
    assert plan.cuts
    plan.apply(model)(x)


def test_a_size_that_only_training_reads() -> None:
    class Reading(nn.Sequential):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            hidden = self[1](self[0](x))
            return self[2](hidden if scale is None else hidden.reshape(len(x), 8) * scale)

    model, x = Reading(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(2, 3)
    graph = fxslim.trace(model, x, train_inputs=(x, torch.ones(())))
    assert "0" in graph.frozen_layers()
    plan = fxslim.plan_pruning(model, x, ratio=0.4, importance="random")
    plan = dataclasses.replace(plan, train_inputs=(fxslim.Inputs(x, torch.ones(())),))
    with pytest.raises(fxslim.PlanError, match=r"forward failed in train mode .*written as a number"):
        plan.apply(model)
    assert model[0].out_features == 8


@pytest.mark.parametrize("merged", [True, False])
def test_views_of_no_boxes(merged: bool) -> None:
    class Empty(nn.Module):
        """None of the rows passes the threshold; what makes their boxes is pruned all the same."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.boxes, self.head = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.stem(x).tanh()
            found = self.boxes(hidden[x[:, 0] > 9])
            return self.head(hidden), found.reshape(-1, 4) if merged else found.reshape(len(found), 3, 4)

    model, x = randomise(Empty()), torch.randn(6, 5)
    plan = fxslim.plan_pruning(model, x, ratio=0.3, importance="random")
    assert {"stem.weight", "boxes.weight"} <= {cut.name for cut in plan.cuts}
    many = x.clone()
    many[:, 0] = 10
    assert plan.verify(model, [x, many]).ok
