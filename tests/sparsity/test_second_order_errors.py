# SPDX-License-Identifier: Apache-2.0
"""What pruning by the Hessian refuses, and how it says so."""

from typing import Any

import pytest
import torch

from fxslim.errors import CalibrationError, ConfigError
from fxslim.patterns import NM, Block, Unstructured
from fxslim.sparsity.second_order import prune_by_hessian


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_odd_numbers_are_counted(odd: float) -> None:
    weight, gram = torch.ones(2, 4), torch.eye(4)
    weight[0, 1:] = odd
    with pytest.raises(ConfigError, match="3 of 8 entries of weight are NaN or infinite: mend the model"):
        prune_by_hessian(weight, gram, NM(2, 4))
    gram[2, 3] = odd
    with pytest.raises(CalibrationError, match="1 of 16 entries of gram are NaN or infinite: look for"):
        prune_by_hessian(torch.ones(2, 4), gram, NM(2, 4))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"pattern": "2:4"}, "pattern must be NM, Block or Unstructured, got '2:4'"),
        ({"pattern": Block()}, "cin32cout64 has no ratio: give one"),
        ({"pattern": Unstructured()}, "unstructured has no ratio: give one"),
        ({"damping": -0.1}, "damping=-0.1 must be a number >= 0"),
        ({"damping": True}, "damping=True must be a number >= 0"),
        ({"damping": torch.inf}, "damping=inf must be a number >= 0"),
        ({"block_size": 0}, "block_size=0 must be an integer >= 1"),
        ({"sweeps": -1}, "sweeps=-1 must be an integer >= 0"),
        ({"weight": torch.ones(4)}, r"weight must be \(out, in, \*kernel\) of floats, got \(4,\) of torch.float32"),
        ({"weight": torch.ones(2, 4).int()}, r"got \(2, 4\) of torch.int32"),
        ({"gram": torch.eye(3)}, r"\(2, 4\) reads 4 values: gram must be 4 x 4 .* got \(3, 3\) of torch.float32"),
        ({"gram": torch.eye(4).half()}, r"of float32 or float64, got \(4, 4\) of torch.float16"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], said: str) -> None:
    arguments = {"weight": torch.ones(2, 4), "gram": torch.eye(4), "pattern": NM(2, 4)} | given
    with pytest.raises(ConfigError, match=said):
        prune_by_hessian(**arguments)
