# SPDX-License-Identifier: Apache-2.0
"""What torch exports, settled, is run in integers by ONNX Runtime."""

import numpy as np
import pytest
import torch
from torch import nn

from fxslim.export.passes import settle
from tests.export.passes.quantized_networks import ResidualNet, SequenceNet, ShuffledNet, exported
from tests.export.passes.runtime import check, operators_in, operators_of, outputs_of

# Nothing is computed in float; what is left moves values.
INTEGER = {"QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool", "QGemm", "NhwcMaxPool"}
MOVING = {"Transpose", "Reshape", "Squeeze", "Split", "Resize"}
ENDS = {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize(
    ("network", "counts"),
    [
        (ResidualNet, {"QLinearConv": 5, "QLinearAdd": 1, "QLinearConcat": 1, "QGemm": 1, "NhwcMaxPool": 1}),
        (ShuffledNet, {"QLinearConv": 4, "QLinearAdd": 1, "QLinearConcat": 1, "QGemm": 1, "Clip": 1}),
    ],
)
def test_images_are_computed_in_integers_from_the_first_quantizer_to_the_last(
    network: type[nn.Module], counts: dict[str, int]
) -> None:
    x = torch.randn(2, 3, 32, 32)
    net = network()
    model = exported(net, x)
    before = outputs_of(model, [x.numpy()])[0]
    check(settle(model))
    after = outputs_of(model, [x.numpy()])[0]
    run = operators_of(model, [x.numpy()])
    assert {name: run[name] for name in counts} == counts
    assert run["QLinearGlobalAveragePool"] == 1
    assert set(run) <= INTEGER | MOVING | ENDS | {"Clip"}
    assert run["QuantizeLinear"] == run["DequantizeLinear"] == 1
    step = float(net.result.scale)
    # A bias that moved by half a step of its int32 may move a value to the next step of a grid.
    assert np.abs(after - before).max() <= step * 1.01
    assert np.abs(outputs_of(model, [x.numpy()], fused=True)[0] - before).max() <= step * 2.01


def test_without_integer_bounds_each_q_is_followed_by_its_dq() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = settle(exported(ShuffledNet(), x), integer_bounds=False)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert {use.node.op_type for use in node.outputs[0].uses()} == {"DequantizeLinear"}
    assert operators_in(model).count("Clip") == 1
    assert operators_of(model, [x.numpy()])["QLinearConv"] == 4


def test_sequences_are_computed_in_integers_between_norms() -> None:
    x = torch.randn(2, 5, 16)
    model = exported(SequenceNet(), x)
    before = outputs_of(model, [x.numpy()])[0]
    check(settle(model))
    np.testing.assert_allclose(outputs_of(model, [x.numpy()])[0], before, atol=0.05)
    run = operators_of(model, [x.numpy()])
    assert run == {
        "QuantizeLinear": 2, "Reshape": run["Reshape"], "QGemm": 3, "MatMulIntegerToFloat": 1, "LayerNormalization": 1
    }  # fmt: skip
