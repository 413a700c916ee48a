# SPDX-License-Identifier: Apache-2.0
"""What other tools' users write, in one line here: the table of docs/sparsity.md."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.patterns import check
from tests.sparsity.small_networks import batches, small_net


class Transformer(nn.Module):
    """A block of linear layers, whose names say what they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("query", "key", "value")})
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.attention[name](x) for name in ("query", "key", "value"))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.conv((x + self.mlp(mixed)).transpose(1, 2))


@pytest.mark.parametrize("method", ["magnitude", "hessian", "par", "par_v2"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("uniform", [True, False])
def test_msmodelslim_sparse_config(method: str, progressive: bool, uniform: bool) -> None:
    """SparseConfig(method=..., sparse_ratio=0.5, progressive=..., uniform=...) on linear layers only."""
    model, dataset = Transformer(), [torch.randn(4, 8, 16) for _ in range(4)]
    fxslim.sparsify(
        model, "unstructured", ratio=0.5, method=method, layers=nn.Linear, data=dataset,
        scope="layer" if uniform else "adaptive", progressive=progressive,
    )  # fmt: skip
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((layer.masked() == 0).sum()) for layer in linear)
    assert zeros == pytest.approx(0.5 * sum(layer.weight.numel() for layer in linear), rel=0.01)
    shares = {round(float((layer.masked() == 0).float().mean()), 2) for layer in linear}
    assert (shares == {0.5}) == uniform
    assert type(model.conv) is nn.Conv1d


def test_knight_mc_asp_cfg() -> None:
    """network lists parameters, asp_cfg says CustomPruner or Pruner2to4; the optimizer goes on."""
    names = ["0.weight", "7.weight"]
    for sparsity_method, pattern in (("CustomPruner", "cin32cout64"), ("Pruner2to4", "2:4")):
        model = small_net().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        plan = fxslim.plan_sparsity(model, pattern, ratio=0.5, layers=names, ineligible="ignore")
        plan.apply(model, optimizer=optimizer)
        # A linear layer of 24 x 32 is one block of Cin32Cout64, and never goes whole.
        assert [one.name for one in plan.weights] == (names if sparsity_method == "Pruner2to4" else ["0.weight"])
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert all(found.ok for found in plan.check(model).values())
        if sparsity_method == "CustomPruner":
            # 9 blocks, one for each place of the kernel.
            assert [found.groups for found in plan.check(model).values()] == [9]


def test_knight_mc_fixed_sparsity_of_two_to_four() -> None:
    with pytest.raises(fxslim.ConfigError, match=r"ratio=0\.7 contradicts 2:4"):
        fxslim.sparsify(small_net(), "2:4", ratio=0.7)


def test_amct_four_select_two_with_update_freq() -> None:
    """n_out_of_m_type M4N2: the mask follows the weights every update_freq-th batch, and export bakes it."""
    model = fxslim.sparsify(small_net().train(), "2:4", update_freq=2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    masks = []
    for x, y in batches() * 2:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        masks.append(model[7].weight_mask)
        optimizer.step()
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(masks)]
    assert changed[::2] == [False] * 3
    fxslim.sparsity.bake(model)
    assert check(model[0], "2:4").ok
    assert type(model[0]) is nn.Conv2d


def test_nni_level_pruner() -> None:
    model = fxslim.sparsify(
        small_net(), "unstructured", overrides={nn.Conv2d: 0.8, nn.Linear: 0.6, "9": 0.0}, ratio=0.5
    )
    shares = [round(float((~model[i].weight_mask).float().mean()), 2) for i in (0, 3, 7)]
    assert shares == [0.8, 0.8, 0.6]
    assert type(model[9]) is nn.Linear


def test_torch_ao_and_apex_two_four() -> None:
    """The same mask as the largest two of each four: what WeightNormSparsifier and ASP choose."""
    model = small_net()
    weight = model[7].weight.detach().abs().view(-1, 4)
    best = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, weight.topk(2).indices, True)
    fxslim.sparsify(model, "2:4", layers="7")
    assert torch.equal(model[7].weight_mask, best.view(24, 32))
