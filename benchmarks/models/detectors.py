# SPDX-License-Identifier: Apache-2.0
"""Torchvision's detection models at small sizes: example inputs, training targets, layers that make raw outputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection as family
from torchvision.models import get_model, list_models

NAMES = tuple(list_models(module=family))
# Layers that make raw outputs, before boxes are chosen: each model has some of them.
RAW_OUTPUTS = (
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
    "roi_heads.mask_predictor.mask_fcn_logits",
    "roi_heads.keypoint_predictor.kps_score_lowres",
    "head.classification_head.cls_logits",
    "head.regression_head.bbox_reg",
    "head.regression_head.bbox_ctrness",
)


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A model in eval mode; ``inputs`` for it, ``train_inputs`` with targets, names of layers with raw ``outputs``."""

    model: nn.Module
    inputs: tuple[Any, ...]
    train_inputs: tuple[Any, ...]
    outputs: tuple[str, ...]


def images(sizes: tuple[tuple[int, int], ...], generator: torch.Generator) -> list[Tensor]:
    """Pictures of different sizes."""
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def target(height: int, width: int, generator: torch.Generator, *, keypoints: bool) -> dict[str, Tensor]:
    """Three boxes at random places with labels and masks, or each with 17 points."""
    low = torch.rand(3, 2, generator=generator) * 0.4
    high = low + 0.2 + torch.rand(3, 2, generator=generator) * 0.4
    scale = torch.tensor([width, height])
    found = {
        "boxes": torch.cat([low * scale, high * scale], 1),
        "labels": torch.ones(3, dtype=torch.int64),
        "masks": (torch.rand(3, height, width, generator=generator) > 0.5).to(torch.uint8),
    }
    if keypoints:
        inside = low[:, None] + (high - low)[:, None] * torch.rand(3, 17, 2, generator=generator)
        found["keypoints"] = torch.cat([inside * scale, torch.ones(3, 17, 1)], 2)
    return found


def _settings(name: str) -> dict[str, Any]:
    """Small images and few boxes, all of which count: nothing is too unlikely to be compared."""
    if name.startswith("ssd"):
        return {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 20, "num_classes": 5}
    small = {"min_size": 96, "max_size": 128, "num_classes": 2 if name.startswith("keypoint") else 5}
    if "rcnn" not in name:
        return small | {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50}
    few = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 50}
    return small | few | {"box_score_thresh": 0.0, "box_detections_per_img": 6, "box_batch_size_per_image": 16}


def raw_outputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that make raw outputs."""
    last = [f"head.{kind}_head.module_list" for kind in ("classification", "regression")]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)]
    found = [name for name in names if name in RAW_OUTPUTS]
    for start in last:
        inside = [name for name in names if name.startswith(start)]
        found += [name for name in inside if name.count(".") == 3 or name.endswith(".1")]
    return tuple(found)


def build(name: str) -> Detector:
    """A detector with random weights and statistics, two images of different sizes and their targets."""
    # The zoo reads this file.
    from benchmarks.models.zoo import randomise

    generator = torch.Generator().manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, **_settings(name))
    randomise(model)
    settle(model, generator)
    sizes = ((90, 120), (100, 104))
    targets = [target(*size, generator, keypoints=name.startswith("keypoint")) for size in sizes]
    return Detector(
        model=model.eval(),
        inputs=(images(sizes, generator),),
        train_inputs=(images(sizes, generator), targets),
        outputs=raw_outputs(model),
    )


def settle(model: Any, generator: torch.Generator) -> None:
    """Running statistics near those of real activations: a deep model neither fades nor turns chaotic."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model.backbone(torch.randn(2, 3, 320, 320, generator=generator))
    for norm in norms:
        norm.momentum = 0.1
        assert norm.running_mean is not None
        assert norm.running_var is not None
        spread = norm.running_var.clamp(min=0.1)
        norm.running_mean += torch.randn(spread.shape, generator=generator) * 0.3 * spread.sqrt()
        norm.running_var = spread * (torch.rand(spread.shape, generator=generator) + 0.5)
    model.eval()
