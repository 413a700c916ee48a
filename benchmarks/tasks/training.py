# SPDX-License-Identifier: Apache-2.0
"""Training and testing on the letters; the same seed gives the same weights, bit for bit, on one machine."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.tasks.glyphs import letter_images


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast: passes over the training images and the highest learning rate of AdamW."""

    epochs: float
    rate: float
    batch: int = 128


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images in uint8, channels last, and labels."""

    images: Tensor
    labels: Tensor

    @classmethod
    def made(cls, count: int, seed: int) -> "Pictures":
        images, labels = letter_images(count, seed)
        return cls(
            images=torch.from_numpy(images).contiguous(memory_format=torch.channels_last),
            labels=torch.from_numpy(labels),
        )

    def batch(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self.images[chosen].float().div_(64).sub_(2), self.labels[chosen]

    def batches(self, count: int, size: int = 250) -> list[tuple[Tensor, Tensor]]:
        """The first ``count`` images in order, as a user gives them to ``data=``."""
        return [self.batch(slice(start, min(start + size, count))) for start in range(0, count, size)]


def train(model: nn.Module, pictures: Pictures, recipe: Recipe, seed: int, teacher: Tensor | None = None) -> nn.Module:
    """AdamW; the rate climbs for a tenth of the steps and falls to nothing along a half cosine.

    ``teacher``: a better network's logits of all images, which are learned instead of the labels.
    """
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.05)
    steps = max(2, round(recipe.epochs * len(pictures.labels) / recipe.batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.1)
    for chosen in _orders(len(pictures.labels), recipe.batch, steps, seed):
        images, labels = pictures.batch(chosen)
        logits = model(images)
        if teacher is None:
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
        else:
            loss = _distance(logits, teacher[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _distance(logits: Tensor, wanted: Tensor, temperature: float = 2.0) -> Tensor:
    """Of softened probabilities (Hinton et al., 2015)."""
    ours, theirs = (nn.functional.log_softmax(each / temperature, 1) for each in (logits, wanted))
    return temperature**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def all_logits(model: nn.Module, pictures: Pictures, size: int = 500) -> Tensor:
    """What the model says of all images."""
    model.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        starts = range(0, len(pictures.labels), size)
        return torch.cat([model(pictures.batch(slice(start, start + size))[0]) for start in starts])


def _orders(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of each step's images: every pass goes through all in its own order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def accuracy(model: nn.Module, pictures: Pictures, size: int = 500) -> float:
    """The share of images, in percent, whose class the model finds."""
    model.eval().to(memory_format=torch.channels_last)
    right = 0
    with torch.no_grad():
        for start in range(0, len(pictures.labels), size):
            images, labels = pictures.batch(slice(start, start + size))
            right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(pictures.labels)


def reestimate_norms(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Running statistics of batch norms become the mean over these batches; nothing else changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        with torch.no_grad():
            for images, _ in batches:
                model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
