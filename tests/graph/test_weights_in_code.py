# SPDX-License-Identifier: Apache-2.0
"""Weights that a forward reads past their layer are masked without an example to run, too."""

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.graph.weights_in_code import users_in_code
from fxslim.sparsity import bake
from tests.sparsity.small_networks import HandsOver


class Asks(nn.Module):
    """Looks at a weight, but only at what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype)) * self.layer.weight.shape[0]


class Both(nn.Module):
    """Calls a layer and uses its weight once more, as tied decoders do; the other is deeper down."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"deep": nn.Linear(8, 8)})
        self.inner.deep2 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x) @ self.layer.weight
        return nn.functional.linear(self.inner["deep"](hidden), self.inner.deep2.weight)


def test_what_a_forward_says() -> None:
    assert users_in_code(Asks()) == {}
    assert users_in_code(nn.Sequential(HandsOver())) == {"0.second.weight": "0"}
    assert users_in_code(Both()) == {"layer.weight": "layer", "inner.deep2.weight": ""}


@pytest.mark.parametrize("kind", [Asks, HandsOver, Both])
def test_masked_as_baked_without_examples(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(), nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    dense = model(x)
    plan = fxslim.plan_sparsity(model, "2:4", update_freq=1)
    assert len(plan.weights) == sum(isinstance(m, nn.Linear) for m in model.modules())
    masked = plan.apply(model)(x)
    assert not torch.equal(masked, dense)
    model.train()(x).sum().backward()
    for name, module in model.named_modules():
        if hasattr(module, "weight_mask"):
            assert int(module.num_mask_batches) == 1, name
            assert not module.stored().grad[~module.weight_mask].any()
    torch.testing.assert_close(bake(model.eval())(x), masked)
