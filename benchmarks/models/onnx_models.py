# SPDX-License-Identifier: Apache-2.0
"""Models that the ONNX zoo exports, in eval mode with random weights, each with one batch of inputs."""

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer, get_model, list_models

import fxslim
from benchmarks.models import detectors, quant_zoo
from benchmarks.models.zoo import randomise, settle_norms

CLASSIFIERS = tuple(list_models(module=torchvision.models))
SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
# Pictures of so many pixels for detectors: SSD's last layers need its own.
DETECTORS = {
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
    "retinanet_resnet50_fpn": 128,
    "fcos_resnet50_fpn": 128,
    "fasterrcnn_resnet50_fpn": 128,
    "fasterrcnn_mobilenet_v3_large_fpn": 128,
}
# Not run: in float64 and in copies they need more memory than a small machine has.
TOO_LARGE = {"vit_h_14": "632 million parameters, 2.5 GB", "regnet_y_128gf": "645 million parameters, 2.6 GB"}
# Heads that only training runs: calibration finds no ranges for them.
TRAINING_HEADS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
BATCH = 4


class RawOutputs(nn.Module):
    """A detector's backbone, feature pyramid and dense head (of R-CNNs that which proposes regions): no boxes yet."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(x)
        return tuple(tree_leaves(self.head(list(features.values()))))


class SmallBert(nn.Module):
    """Tokens and places are embedded, two encoder layers follow, the first token is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(1000, 128), nn.Embedding(32, 128)
        self.norm = nn.LayerNorm(128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.pool, self.classify = nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.encoder(self.norm(self.tokens(tokens) + self.places(places)))
        return self.classify(torch.tanh(self.pool(x[:, 0])))


def small_vit() -> nn.Module:
    """Four blocks, 128 wide, on patches of 8 pixels."""
    return VisionTransformer(
        image_size=64, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=10
    )


SMALL: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "small_bert": lambda: (SmallBert(), torch.randint(0, 1000, (BATCH, 32))),
    "small_vit": lambda: (small_vit(), torch.randn(BATCH, 3, 64, 64)),
}
NAMES = (*CLASSIFIERS, *SEGMENTATION, *DETECTORS, *SMALL)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model and a batch of random inputs."""
    if name in DETECTORS:
        model: nn.Module = RawOutputs(detectors.build(name).model)
        return model.eval(), torch.randn(BATCH, 3, DETECTORS[name], DETECTORS[name])
    if name in SMALL:
        model, x = SMALL[name]()
    elif name in SEGMENTATION:
        model = get_model(name, weights=None, weights_backbone=None, num_classes=10)
        x = torch.randn(BATCH, 3, 96, 96)
    else:
        model, few = quant_zoo.build(name)
        return model, torch.randn(BATCH, *few.shape[1:])
    settle_norms(randomise(model), fxslim.Inputs(x))
    return model.eval(), x
