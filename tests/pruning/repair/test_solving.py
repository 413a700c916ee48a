# SPDX-License-Identifier: Apache-2.0
"""Normal equations: equal to lstsq, and near to 0 where the data say nothing."""

import pytest
import torch

from fxslim.pruning.repair.moments import Moments, add_products, refitted
from fxslim.pruning.repair.solving import solve_normal


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_full_rank_is_lstsq(scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64) * torch.logspace(-4, 4, 12).double() * scale
    y = torch.randn(200, 3, dtype=torch.float64)
    found = solve_normal(x.t() @ x, x.t() @ y)
    wanted = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rows", [4, 200])
def test_what_the_data_do_not_tell_stays_near_0_and_the_residual_is_that_of_lstsq(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 12, dtype=torch.float64)
    x[:, 3] = 2 * x[:, 1] - x[:, 2]
    x[:, 4] = 0
    y = torch.randn(rows, 3, dtype=torch.float64)
    found = solve_normal(x.t() @ x, x.t() @ y)
    wanted = torch.linalg.lstsq(x, y, driver="gelsd").solution
    torch.testing.assert_close(x @ found, x @ wanted, rtol=1e-6, atol=1e-6)
    assert (found[4] == 0).all()
    assert found.norm() < 3 * wanted.norm()


def test_no_columns_and_no_rows() -> None:
    assert solve_normal(torch.zeros(0, 0).double(), torch.zeros(0, 2).double()).shape == (0, 2)
    assert not solve_normal(torch.zeros(3, 3).double(), torch.zeros(3, 2).double()).any()


def test_one_set_of_products_serves_any_kept_columns() -> None:
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(1, 300, 6).double(), torch.randn(1, 2, 6, 1).double(), torch.randn(1, 2).double()
    rows[0, :, 5] += rows[0, :, 0] + 1
    products = add_products(None, rows, rows)
    y = rows[0] @ weight[0, :, :, 0].t() + bias[0]
    for kept in ([0, 1], [5, 2, 0, 1], [4]):
        new_weight, new_bias = refitted(
            weight, bias, Moments.of_original(products, torch.tensor([kept])), torch.tensor([kept])
        )
        augmented = torch.cat([rows[0][:, kept], torch.ones(300, 1).double()], 1)
        wanted = torch.linalg.lstsq(augmented, y).solution.t()
        torch.testing.assert_close(new_weight[0, :, kept, 0], wanted[:, :-1])
        torch.testing.assert_close(new_bias[0], wanted[:, -1])
