# SPDX-License-Identifier: Apache-2.0
"""One way of pruning on one trained network: accuracy right after, repaired, and after fine-tuning."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fxslim
from benchmarks.tasks.candidates import Candidate, our_candidate
from benchmarks.tasks.networks import NETWORKS
from benchmarks.tasks.remembering import Memory, digest, model_digest
from benchmarks.tasks.torch_pruning_rows import RIVALS, rival_candidates
from benchmarks.tasks.training import Pictures, Recipe, accuracy, reestimate_norms, train

TRAIN_SEED, TEST_SEED = 1, 2
EXAMPLE = torch.zeros(1, 3, 32, 32)
RECIPES = {
    "resnet": Recipe(epochs=3, rate=4e-3),
    "mobilenet": Recipe(epochs=2.5, rate=4e-3),
    "vit": Recipe(epochs=5, rate=1.5e-3),
    "wide_resnet": Recipe(epochs=1.5, rate=4e-3),
    "wide_mobilenet": Recipe(epochs=2.5, rate=4e-3),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all contestants share: the share of macs that goes, data to look at, and fine-tuning."""

    ratio: float = 0.5
    calibration: int = 2000
    epochs: float = 1.0
    heads: str = "whole"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Test accuracies in percent and the share of macs kept; ``note`` names the settings chosen."""

    macs: float
    right_after: float
    repaired: float
    fine_tuned: float
    note: str = ""


class Contest:
    """Everything that contestants share, and the memory of what was measured."""

    def __init__(self, memory: Memory, settings: Settings, train_count: int, test_count: int) -> None:
        self.memory, self.settings = memory, settings
        self.pictures = Pictures.made(train_count, TRAIN_SEED)
        self.unseen = Pictures.made(test_count, TEST_SEED)
        self.batches = self.pictures.batches(settings.calibration)

    def base(self, net: str, seed: int) -> nn.Module:
        """The trained network of a seed, which decides its first weights and the order of the images."""
        torch.manual_seed(seed)
        model = NETWORKS[net]().to(memory_format=torch.channels_last)
        key = digest("base", net, seed, RECIPES[net], model_digest(model), len(self.pictures.labels))
        return self.memory.weights(key, model, lambda fresh: train(fresh, self.pictures, RECIPES[net], seed))

    def accuracy(self, model: nn.Module) -> float:
        key = digest("accuracy", model_digest(model), len(self.unseen.labels))
        return self.memory.number(key, lambda: accuracy(model, self.unseen))

    def fine_tuned(self, model: nn.Module, net: str, seed: int) -> float:
        """Accuracy after the fixed budget, at a quarter of the training's rate; all see the same images."""
        recipe = replace(RECIPES[net], epochs=self.settings.epochs, rate=RECIPES[net].rate / 4)
        key = digest(
            "fine-tuned", model_digest(model), seed, recipe, len(self.pictures.labels), len(self.unseen.labels)
        )
        return self.memory.number(
            key, lambda: accuracy(train(copy.deepcopy(model), self.pictures, recipe, 1000 + seed), self.unseen)
        )

    def score(self, name: str, net: str, seed: int) -> Score:
        """Of several candidates (a rival's settings) the one that is best once repaired goes on."""
        base = self.base(net, seed)
        whole = fxslim.trace(base, EXAMPLE).cost.macs
        candidates = self.candidates(name, base, whole, seed)
        if not candidates:
            raise fxslim.FxslimError("none of its settings comes within 3 % of these macs")
        measured = []
        for candidate in candidates:
            fixed = repaired(candidate, self.batches)
            measured.append((self.accuracy(fixed), candidate, fixed))
        best, candidate, fixed = max(measured, key=lambda found: found[0])
        return Score(
            macs=candidate.macs / whole,
            right_after=self.accuracy(candidate.model),
            repaired=best,
            fine_tuned=self.fine_tuned(fixed, net, seed),
            note=candidate.settings,
        )

    def candidates(self, name: str, base: nn.Module, whole: int, seed: int) -> list[Candidate]:
        if name in RIVALS:
            return rival_candidates(name, base, EXAMPLE, self.batches, round(whole * (1 - self.settings.ratio)))
        settings = self.settings
        return [our_candidate(name, base, EXAMPLE, self.batches, ratio=settings.ratio, heads=settings.heads, seed=seed)]


def repaired(candidate: Candidate, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A copy, repaired without training: what its method mends, then batch norms see the images again, as for all."""
    return reestimate_norms(copy.deepcopy(candidate.mended or candidate.model), batches)
