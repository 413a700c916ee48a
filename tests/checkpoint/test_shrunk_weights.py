# SPDX-License-Identifier: Apache-2.0
"""Smaller models filled from bigger ones."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxslim import BlockMap, CheckpointError, ConfigError, load_shrunk
from fxslim.pruning.block_importance import measure_blocks

PATTERN = r"encoder\.layer\.(\d+)\."


class Layer(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.intermediate, self.output = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.output(torch.nn.functional.gelu(self.intermediate(x)))


class Bert(nn.Module):
    def __init__(self, layers: int, dim: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, dim)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Layer(dim, inner) for _ in range(layers)])})
        self.classifier = nn.Linear(dim, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.classifier(x.mean(1))


IDS = torch.randint(0, 50, (2, 6))
SEVEN = {0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 11}


@pytest.mark.parametrize("kind", ["dict", "safetensors", "pt", "nested"])
def test_twelve_blocks_to_seven_with_half_the_inner_size(kind: str, tmp_path) -> None:
    big, small = Bert(12), Bert(7, inner=16)
    weights = {"module." + name: value for name, value in big.state_dict().items()}
    source = weights if kind == "dict" else tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(weights, source)
    elif kind != "dict":
        torch.save(weights if kind == "pt" else {"state_dict": weights, "epoch": 3}, source)
    report = load_shrunk(small, source, BlockMap(PATTERN, SEVEN))
    for new, old in SEVEN.items():
        mine, theirs = small.encoder["layer"][new], big.encoder["layer"][old]
        assert torch.equal(mine.intermediate.weight, theirs.intermediate.weight[:16])
        assert torch.equal(mine.intermediate.bias, theirs.intermediate.bias[:16])
        assert torch.equal(mine.output.weight, theirs.output.weight[:, :16])
        assert torch.equal(mine.attention.in_proj_weight, theirs.attention.in_proj_weight)
    assert torch.equal(small.classifier.weight, big.classifier.weight)
    assert report.missing == report.unexpected == ()
    assert len(report.sliced) == 7 * 3
    assert report.dropped == 5 * len(list(big.encoder["layer"][0].state_dict()))
    small(IDS).sum().backward()


def test_combined_projections_are_cut_by_thirds() -> None:
    big, small = Bert(1, dim=16), Bert(1, dim=8)
    load_shrunk(small, big.state_dict())
    mine, theirs = small.encoder["layer"][0].attention, big.encoder["layer"][0].attention
    rows = [*range(8), *range(16, 24), *range(32, 40)]
    assert torch.equal(mine.in_proj_weight, theirs.in_proj_weight[rows, :8])
    assert torch.equal(mine.in_proj_bias, theirs.in_proj_bias[rows])
    assert torch.equal(mine.out_proj.weight, theirs.out_proj.weight[:8, :8])


def test_the_most_important_entries_are_the_same_in_all_layers_that_share_them() -> None:
    big, small = Bert(3), Bert(2, inner=16)
    with torch.no_grad():
        big.encoder["layer"][2].intermediate.weight[1::2] *= 10
    load_shrunk(small, big.state_dict(), BlockMap(PATTERN, {0: 0, 1: 2}), importance="l2", inputs=IDS)
    mine, theirs = small.encoder["layer"][1], big.encoder["layer"][2]
    assert torch.equal(mine.intermediate.weight, theirs.intermediate.weight[1::2])
    assert torch.equal(mine.output.weight, theirs.output.weight[:, 1::2])


def test_what_is_missing_or_left_over_is_told() -> None:
    big, small = Bert(1).state_dict(), Bert(1)
    big["extra.weight"] = torch.ones(2)
    before = small.classifier.bias.clone()
    del big["classifier.bias"]
    report = load_shrunk(small, big)
    assert report.missing == ("classifier.bias",)
    assert report.unexpected == ("extra.weight",)
    assert torch.equal(small.classifier.bias, before)
    assert "missing, kept as they were: classifier.bias" in str(report)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path) -> None:
    small = Bert(2, inner=64)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"intermediate.weight: the small model wants \(64, 16\)"):
        load_shrunk(small, Bert(2).state_dict())
    with pytest.raises(CheckpointError, match=r"the weights have no block \[7\], only \[0, 1\]"):
        load_shrunk(small, Bert(2).state_dict(), BlockMap(PATTERN, {0: 7}))
    with pytest.raises(CheckpointError, match=r"the small model has no block \[3\]"):
        load_shrunk(small, Bert(2).state_dict(), BlockMap(PATTERN, {3: 0}))
    with pytest.raises(ConfigError, match="has no group for the number of the block"):
        BlockMap(r"encoder\.layer\.", {0: 0})
    with pytest.raises(ConfigError, match="must map block numbers"):
        BlockMap(PATTERN, {"0": 0})
    with pytest.raises(ConfigError, match="needs inputs="):
        load_shrunk(small, {}, importance="l2")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"broken.pt can't be read"):
        load_shrunk(small, tmp_path / "broken.pt")
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_blocks_that_change_little_are_found() -> None:
    model = Bert(3)
    with torch.no_grad():
        for parameter in (model.encoder["layer"][1].output.weight, model.encoder["layer"][1].attention.out_proj.weight):
            parameter.mul_(1e-3)
        model.encoder["layer"][1].output.bias.zero_()
    found = measure_blocks(model, [IDS, IDS.flip(1)], "encoder.layer.*")
    assert min(found, key=found.get) == "encoder.layer.1"
    assert set(found) == {f"encoder.layer.{i}" for i in range(3)}
    with pytest.raises(ConfigError, match=r"encoder\.layers"):
        measure_blocks(model, [IDS], "encoder.layers.*")
