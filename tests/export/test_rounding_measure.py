# SPDX-License-Identifier: Apache-2.0
"""What verify_onnx says that rounding alone may change: in every layer, not only in the first."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fxslim import export_onnx, verify_onnx
from fxslim.nn.quantizers.fixed_quantizers import FixedQuantizer

STEP = 0.125


class BetweenTwoSteps(nn.Module):
    """Whole steps, which come to lie in the middle between two steps when they are multiplied."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        grids = [FixedQuantizer(torch.tensor(STEP), torch.tensor(0), (0, 255)) for _ in range(2)]
        self.before, self.after = grids
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x) * self.factor)


def _rounding(factor: float, folder: Path) -> float:
    x = torch.full((2, 3), 8 * STEP)
    model = BetweenTwoSteps(factor).eval()
    export_onnx(model, x, folder / "m.onnx")
    found = verify_onnx(model, folder / "m.onnx", x)
    assert found.relative == 0.0
    assert not any(module._forward_pre_hooks for module in model.modules())
    return found.rounding


def test_a_tie_behind_a_grid_is_seen(tmp_path: Path) -> None:
    # Of 8 steps 1.0625 times as many are 8.5: one side is 8, the other 9.
    assert _rounding(1.0625, tmp_path) >= 1 / 9


def test_away_from_ties_nothing_is_forgiven(tmp_path: Path) -> None:
    assert _rounding(1.03, tmp_path) == 0.0
