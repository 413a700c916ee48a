# SPDX-License-Identifier: Apache-2.0
"""Faults put into norms that users write, repeated heads and constants: the proof must catch each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxslim.graph.labels import LabelSpace
from fxslim.graph.rules import pixels
from fxslim.graph.size_checks import NewSizes
from fxslim.pruning import silencing
from tests.graph.proofs import picture
from tests.graph.random_networks import randomise
from tests.graph.test_family_mutations import replaced
from tests.graph.test_mutations import Patch, caught, without_slot
from tests.graph.test_repeated_heads import Biased, OneHead, X
from tests.graph.test_written_norms import Around, LayerNorm2d, Residual, Rms


class Centred(nn.Module):
    """No vector: its mean keeps the channels whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


def pictures() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.Sigmoid(), LayerNorm2d(12), nn.Tanh(), nn.Conv2d(12, 4, 1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "stream": (Residual, torch.randn(2, 7, 5)),
    "pictures": (pictures, picture()),
    "centred": (lambda: Around(Centred()), torch.randn(2, 7, 5)),
    "alone": (lambda: Around(Rms(12)), torch.randn(2, 7, 5)),
    "one head": (lambda: OneHead("expand"), X),
    "zeros": (Biased, X),
}


def networks_of(name: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    def build(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        make, x = NETWORKS[name]
        return randomise(make(), seed), x

    return build


FAULTS: dict[str, tuple[str, Patch]] = {
    "weight of a written norm forgotten": ("stream", without_slot("first.weight")),
    "bias of a written norm forgotten": ("pictures", without_slot("2.bias")),
    "every mean passes": ("centred", replaced(pixels, "_averages_in_norm", lambda *_: True)),
    "means over what was removed": ("alone", replaced(silencing, "_averaging", lambda *_: ())),
    "attributes keep their value": ("zeros", replaced(NewSizes, "new_attributes", lambda self: ())),
    "heads keep their number": ("one head", replaced(NewSizes, "new_attributes", lambda self: ())),
    "nothing frozen": ("one head", replaced(LabelSpace, "freeze", lambda self, ids, reason: None)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, patch = FAULTS[name]
    patch(monkeypatch)
    assert caught(networks_of(network), networks=20), f"{name}: no network noticed"


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_fault_nothing_is_caught(name: str) -> None:
    assert not caught(networks_of(name), networks=10)
