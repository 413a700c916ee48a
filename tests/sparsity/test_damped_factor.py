# SPDX-License-Identifier: Apache-2.0
"""Factors exist for any matrix of products, and damp no more than they must."""

import pytest
import torch

from fxslim.sparsity.damped_factor import factor_damped, scale_products
from tests.sparsity.oracles import correlated_gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 40])
def test_the_factor_is_that_of_a_slightly_larger_matrix(num_rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_rows, 20, dtype=dtype)
    products = scale_products(x.t() @ x)
    damped, lower = factor_damped(products, 0.0)
    torch.testing.assert_close(lower @ lower.t(), damped, rtol=1e-5, atol=1e-5)
    ridge = damped - products
    torch.testing.assert_close(ridge, ridge.diagonal().mean() * torch.eye(20, dtype=dtype), rtol=1e-2, atol=1e-6)
    assert 0 <= ridge.diagonal().mean() < 1e-3
    if num_rows == 40:
        assert torch.equal(damped, products)


def test_sums_that_are_no_products_are_damped_until_they_could_be() -> None:
    damped, _ = factor_damped(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01)
    assert torch.equal(damped, torch.tensor([[11.0, 3.0], [3.0, 11.0]]))


def test_damping_is_a_fraction_of_the_mean_over_inputs_that_live() -> None:
    gram = correlated_gram(6) * 100
    gram[2], gram[:, 2] = 0, 0
    scaled = scale_products(gram)
    alive = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(scaled[alive][:, alive], gram[alive][:, alive] / gram.diagonal()[alive].mean())
    assert scaled[2].tolist() == [0, 0, 1, 0, 0, 0]
    damped, _ = factor_damped(scaled, 0.25)
    torch.testing.assert_close(damped, scaled + 0.25 * torch.eye(6).double())
