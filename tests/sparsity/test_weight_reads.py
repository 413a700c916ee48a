# SPDX-License-Identifier: Apache-2.0
"""Who uses a weight: by any operator, but not who looks at it alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxslim
from fxslim.graph.inputs import as_inputs
from fxslim.graph.weight_users import find_users

Forward = Callable[[Any, Tensor], Tensor]
USED: dict[str, Forward] = {
    "transposed": lambda net, x: x @ net.a.weight,
    "einsum": lambda net, x: torch.einsum("bi,oi->bo", x, net.a.weight),
    "cast": lambda net, x: (x.double() @ net.a.weight.double().t()).float(),
    "rows": lambda net, x: x @ net.a.weight[2:6].t(),
    "elementwise": lambda net, x: (x.unsqueeze(1) * net.a.weight).sum(-1),
    "normalised": lambda net, x: nn.functional.linear(x, net.a.weight / net.a.weight.norm(dim=1, keepdim=True)),
    "vector": lambda net, x: torch.mv(net.a.weight, x[0]),
    "table": lambda net, x: x + nn.functional.linear(net.table, net.a.weight),
}
ONLY_SEEN: dict[str, Forward] = {
    "called": lambda net, x: net.a(x),
    "penalty": lambda net, x: net.a(x) + net.a.weight.pow(2).sum(),
    "norm": lambda net, x: net.a(x) * sum(p.norm() for p in net.parameters()),
    "like": lambda net, x: net.a(x) + net.a.weight.new_zeros(8) + torch.ones_like(net.a.weight)[0],
    "shape": lambda net, x: net.a(x).view(-1, net.a.weight.shape[0]).to(net.a.weight.dtype),
    "table": lambda net, x: x + net.a(net.table),
}


class Net(nn.Module):
    table: Tensor

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.register_buffer("table", torch.randn(8, 8))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize("how", USED)
def test_uses_are_found_and_masked(how: str) -> None:
    model, x = Net(USED[how]), torch.randn(8, 8)
    assert find_users(model, as_inputs(x), None) == {"a.weight": ""}
    found = fxslim.sparsify(model, "2:4", example_inputs=x)(x)
    plain = Net(USED[how])
    plain.load_state_dict({"a.weight": model.a.weight, "b.weight": model.b.weight, "table": model.table})
    torch.testing.assert_close(found, plain(x))


@pytest.mark.parametrize("how", ONLY_SEEN)
def test_looking_at_weights_is_no_use(how: str) -> None:
    model, x = Net(ONLY_SEEN[how]), torch.randn(8, 8)
    assert find_users(model, as_inputs(x), None) == {}
    assert type(fxslim.sparsify(model, "2:4", example_inputs=x).a) is fxslim.nn.MaskedLinear


def test_weights_put_together() -> None:
    model = Net(lambda net, x: nn.functional.linear(x, torch.cat([net.a.weight, net.b.weight])))
    x = torch.randn(8, 8)
    assert find_users(model, as_inputs(x), None) == {"a.weight": "", "b.weight": ""}
    found = fxslim.sparsify(model, "2:4", example_inputs=x)(x)
    torch.testing.assert_close(found, x @ torch.cat([model.a.weight, model.b.weight]).t())
