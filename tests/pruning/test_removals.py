# SPDX-License-Identifier: Apache-2.0
"""Entries that are taken out of a parameter go back to where they were, to the bit, in any layout."""

import random

import pytest
import torch
from torch import Tensor, nn

from fxslim.graph.surgery import cutting
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery


def random_case(seed: int) -> tuple[nn.Module, list[Cut]]:
    """A parameter of random rank and layout, and cuts along some of its dims, in any order of the kept entries."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    blocks = pick.choice([1, 1, 2, 3])
    shape = [blocks * pick.randint(1, 4), *(pick.randint(2, 6) for _ in range(pick.randint(1, 3)))]
    value = torch.randn(shape, dtype=pick.choice([torch.float32, torch.float16, torch.float64]))
    if len(shape) == 4 and pick.random() < 0.5:
        value = value.contiguous(memory_format=torch.channels_last)
    elif pick.random() < 0.3:
        value = value.transpose(0, 1).contiguous().transpose(0, 1)
    model = nn.Module()
    model.weight = nn.Parameter(value)
    if pick.random() < 0.8:
        # Else it is most of the model, which is not taken apart.
        model.rest = nn.Parameter(torch.zeros_like(value))
    cuts = []
    if blocks > 1:
        kept = pick.randint(1, shape[1])
        keep = [b * shape[1] + i for b in range(blocks) for i in sorted(pick.sample(range(shape[1]), kept))]
        cuts.append(Cut(name="weight", dim=1, keep=tuple(keep), blocks=blocks))
    for dim, size in enumerate(shape):
        if (dim != 1 or blocks == 1) and (dim > 0 or blocks == 1) and pick.random() < 0.7:
            cuts.append(Cut(name="weight", dim=dim, keep=tuple(pick.sample(range(size), pick.randint(1, size)))))
    return model, cuts


def bits(value: Tensor) -> bytes:
    return value.detach().contiguous().numpy().tobytes()


@pytest.mark.parametrize("seed", range(150))
def test_entries_go_back_to_where_they_were(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if seed % 3:
        monkeypatch.setattr(cutting, "_LARGE", 0)
    model, cuts = random_case(seed)
    weight = model.weight
    before, stride, changes = bits(weight), weight.stride(), Changes()
    Surgery(model, cuts).commit(changes)
    for cut in cuts:
        assert weight.shape[cut.dim] == len(cut.keep) // cut.blocks
    changes.undo()
    assert model.weight is weight
    assert bits(weight) == before
    assert weight.stride() == stride
