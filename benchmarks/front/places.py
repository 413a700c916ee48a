# SPDX-License-Identifier: Apache-2.0
"""A trained network, where the files of its cells go, and what all contestants on it share."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

import fxslim
from benchmarks.tasks.contest import EXAMPLE, RECIPES, TRAIN_SEED, Contest
from benchmarks.tasks.remembering import digest, model_digest
from benchmarks.tasks.training import Pictures, accuracy, all_logits, train

# The row of the table, and the network of the task.
NETS = {"resnet": "wide_resnet", "mobilenet": "wide_mobilenet", "vit": "vit"}
# Widths are multiples of this, for kernels that compute so many at a time.
ROUND_TO = 8
# Training images that choose among settings.
CHOOSING = 4000
# The fixed budget of each contestant, in steps of the whole network: one of half the macs makes twice as many.
STEPS = 100


@dataclass(frozen=True)
class Place:
    """One training of one network (its seed decides first weights and orders of images)."""

    contest: Contest
    net: str
    seed: int
    folder: Path
    steps: int = STEPS

    @property
    def name(self) -> str:
        return NETS[self.net]

    @cached_property
    def base(self) -> nn.Module:
        """The trained network. Not to be changed: take copies."""
        return self.contest.base(self.name, self.seed)

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """What calibrates and what criteria look at."""
        return self.contest.batches

    @property
    def example(self) -> Tensor:
        return self.contest.batches[0][0][:2].contiguous()

    @cached_property
    def macs(self) -> int:
        return fxslim.trace(self.base, EXAMPLE).cost.macs

    @cached_property
    def logits(self) -> Tensor:
        """The trained network's, of all training images: what all learn from."""
        pictures, key = self.contest.pictures, digest("logits", model_digest(self.base), TRAIN_SEED)
        return self.contest.memory.tensor(
            digest(key, len(pictures.labels)), lambda: all_logits(copy.deepcopy(self.base), pictures)
        )

    def best(self, models: Iterable[nn.Module]) -> nn.Module:
        """The most accurate on training images that nothing was calibrated on: how a tool's settings are chosen."""
        seen, pictures = self.contest.settings.calibration, self.contest.pictures
        chosen = slice(seen, seen + CHOOSING)
        others = Pictures(images=pictures.images[chosen], labels=pictures.labels[chosen])
        return max(models, key=lambda model: accuracy(model, others))

    def trained(self, model: nn.Module, macs: int) -> nn.Module:
        """Trained on for the fixed budget: all see the same images in the same order, at the same highest rate."""
        recipe, pictures = RECIPES[self.name], self.contest.pictures
        steps = self.steps * self.macs / macs
        recipe = replace(recipe, epochs=steps * recipe.batch / len(pictures.labels), rate=recipe.rate / 2)
        return train(model, pictures, recipe, 1000 + self.seed, self.logits)
