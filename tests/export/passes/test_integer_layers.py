# SPDX-License-Identifier: Apache-2.0
"""Biases, products, means and weights as the integer kernels take them."""

import numpy as np
import onnx_ir as ir
import pytest

from fxslim.export.passes import settle
from fxslim.export.passes.integer_biases import store_biases_as_integers
from tests.export.passes.runtime import check, operators_in, operators_of, outputs_of, parsed

NUMBERS = np.random.default_rng(3)
GRIDS = {"s": np.float32(0.02), "z": np.uint8(120), "small": np.float32(1e-30), "o": np.float32(0.5), "z8": np.int8(0)}
WEIGHTS = {
    "k": NUMBERS.integers(-127, 128, (5, 4)).astype(np.int8),
    "c": NUMBERS.integers(-127, 128, (5, 4, 1, 1)).astype(np.int8),
    "ks": NUMBERS.uniform(0.01, 0.02, 5).astype(np.float32), "kz": np.zeros(5, np.int8),
    "b": NUMBERS.normal(size=5).astype(np.float32), "k1": np.float32(0.015),
}  # fmt: skip
IN = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
OUT = " p = QuantizeLinear(m, o, z) y = DequantizeLinear(p, o, z)"
ROWS = "w = DequantizeLinear<axis=0>(k, ks, kz) "
IMAGES = "w = DequantizeLinear<axis=0>(c, ks, kz) "
LAYERS = [
    ("3,4", ROWS + "m = Gemm<transB=1>(d, w, b)"),
    ("3,4", "w = DequantizeLinear(k, k1, z8) m = Gemm<transB=1>(d, w, b)"),
    ("2,4,3,3", IMAGES + "m = Conv(d, w, b)"),
]


def model_of(dims: str, text: str, **changed: np.ndarray) -> tuple[ir.Model, np.ndarray]:
    model = parsed(f"g (float[{dims}] x) => (float[] y) {{ {text} }}", **{**GRIDS, **WEIGHTS, **changed})
    sizes = [int(size) if size.isdigit() else 3 for size in dims.split(",")]
    return model, NUMBERS.normal(size=sizes).astype(np.float32)


@pytest.mark.parametrize(("dims", "text"), LAYERS)
def test_a_bias_is_stored_on_the_grid_of_the_sums(dims: str, text: str) -> None:
    model, x = model_of(dims, IN + text.replace("m =", "y ="))
    before = outputs_of(model, [x])[0]
    assert store_biases_as_integers(model)
    check(model)
    layer = next(node for node in model.graph if node.op_type in ("Gemm", "Conv"))
    stored, scale, zero = (value.const_value.numpy() for value in layer.inputs[2].producer().inputs)
    assert stored.dtype == zero.dtype == np.int32
    assert not zero.any()
    weight_scale = layer.inputs[1].producer().inputs[1].const_value.numpy()
    np.testing.assert_array_equal(scale, np.float32(0.02) * weight_scale)
    np.testing.assert_allclose(stored * scale, WEIGHTS["b"], atol=scale.max() / 2)
    np.testing.assert_allclose(outputs_of(model, [x])[0], before, atol=scale.max() / 2 + 1e-5)
    assert not store_biases_as_integers(model)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (IN + ROWS + "y = Gemm<transB=1>(d, w, b)", {"b": np.full(5, np.nan, np.float32)}),
        (IN + ROWS + "y = Gemm<transB=1, alpha=0.5>(d, w, b)", {}),
        (IN + ROWS + "n = Neg(d) y = Gemm<transB=1>(n, w, b)", {}),
        (IN + "w = DequantizeLinear<axis=1>(k, s4, z4) y = Gemm<transB=1>(d, w, b)", {}),
        (IN + ROWS + "n = Neg(w) y = Gemm<transB=1>(d, n, b)", {}),
        (IN + ROWS + "y = Gemm<transB=1>(d, w, b)", {"kz": np.ones(5, np.int8)}),
        (IN + ROWS + "n = Neg(b) y = Gemm<transB=1>(d, w, n)", {}),
    ],
    ids="nan alpha float_input other_axis float_weight offset computed".split(),
)
def test_a_bias_of_no_integer_layer_stays_in_float(text: str, changed: dict[str, np.ndarray]) -> None:
    extra = {"s4": np.full(4, 0.01, np.float32), "z4": np.zeros(4, np.int8)}
    model, _ = model_of("3,4", text, **extra, **changed)
    assert not store_biases_as_integers(model)


def test_products_and_bias_together_must_fit() -> None:
    """Where they do, the weight stays what it is; a little more, and it gets coarser."""
    room = 2**31 - 1 - np.abs(WEIGHTS["k"].astype(np.int64)).sum(1).max() * 135
    steps = np.full(5, 2.0**-10, np.float32)
    for bias, fits in ((room - 2000, True), (room + 2000, False)):
        held = np.full(5, bias * 2.0**-14, np.float64).astype(np.float32)
        model, _ = model_of("3,4", IN + LAYERS[0][1].replace("m =", "y ="), s=np.float32(2**-4), ks=steps, b=held)
        assert store_biases_as_integers(model)
        assert ("ks" in [value.name for node in model.graph for value in node.inputs]) == fits


LARGE = {"b": np.array([0.3, 1e6, -0.2, -3e7, 0.1], np.float32)}
DEAD = {"ks": np.array([0.01, 1e-12, 0.02, 1e-30, 0.015], np.float32)}
FADED = {"s": GRIDS["small"], "ks": np.full(5, 1e-20, np.float32), "k1": np.float32(1e-20)}
TRANSPOSED = ("2,5,3,3", "w = DequantizeLinear<axis=1>(t, ks4, kz4) m = ConvTranspose(d, w, b4)")


@pytest.mark.parametrize("changed", [LARGE, DEAD, FADED], ids=["large biases", "dead filters", "faded input"])
@pytest.mark.parametrize(("dims", "text"), [*LAYERS, TRANSPOSED])
def test_a_bias_that_does_not_fit_makes_its_weight_coarser(
    dims: str, text: str, changed: dict[str, np.ndarray]
) -> None:
    """And the runtime, which stores float biases as int32 by itself, computes what the operators say."""
    constants = {**WEIGHTS, **changed}
    extra = {"t": WEIGHTS["c"], "ks4": constants["ks"][:4], "kz4": np.zeros(4, np.int8), "b4": constants["b"][:4]}
    model, x = model_of(dims, IN + text.replace("m =", "y ="), **{**changed, **extra})
    before = outputs_of(model, [x])[0]
    assert store_biases_as_integers(model)
    check(model)
    # Of each product, 255 at most, half a step of the weight on which the bias takes 2^30; of the bias half a step.
    largest = np.abs(constants["b"]) if "axis" in text else np.abs(constants["b"]).max(keepdims=True)
    bound = largest * (255 * 5 / 2**31) + constants["s" if "s" in changed else "ks"].max() * 0.02
    bound = bound[: before.shape[1]].reshape(-1, *[1] * (before.ndim - 2))
    for fused in (False, True):
        after = outputs_of(model, [x], fused=fused)[0]
        assert (np.abs(after - before) <= bound + 1e-6 * np.abs(before)).all()


@pytest.mark.parametrize("dims", ["2,3,4", "N,3,4", "N,M,4", "2,3,2,4"])
@pytest.mark.parametrize("order", ["Add(n, b)", "Add(b, n)"])
def test_a_linear_layer_on_sequences_is_one_integer_product(dims: str, order: str) -> None:
    text = IN + ROWS + f"t = Transpose<perm=[1,0]>(w) n = MatMul(d, t) m = {order}" + OUT
    model, x = model_of(dims, text)
    before = outputs_of(model, [x])[0]
    check(settle(model))
    assert "MatMul" not in operators_in(model)
    assert not {"k", "b"} & set(model.graph.initializers)
    after = outputs_of(model, [x])[0]
    assert after.shape == before.shape
    assert np.abs(after - before).max() <= 0.5
    run = operators_of(model, [x])
    assert run["QGemm"] == 1
    assert set(run) <= {"QuantizeLinear", "DequantizeLinear", "QGemm", "Reshape", "Shape", "Concat"}


def test_a_product_without_bias_is_left_to_the_runtime() -> None:
    model, x = model_of("2,3,4", IN + ROWS + "t = Transpose<perm=[1,0]>(w) m = MatMul(d, t)" + OUT)
    before = outputs_of(model, [x])[0]
    settle(model)
    np.testing.assert_array_equal(before, outputs_of(model, [x])[0])
    assert operators_of(model, [x])["QLinearMatMul"] == 1


@pytest.mark.parametrize(
    "text",
    [
        IN + ROWS + "t = Transpose<perm=[1,0]>(w) n = MatMul(d, t) e = Add(n, b) y = Add(e, n)",
        "w = DequantizeLinear(k, k1, z8) t = Transpose<perm=[1,0]>(w) n = MatMul(x, t) y = Add(n, b)",
        IN + ROWS + "t = Transpose<perm=[1,0]>(w) n = MatMul(d, t) y = Add(n, one)",
    ],
    ids=["read_twice", "float_input", "scalar_bias"],
)
def test_other_products_stay(text: str) -> None:
    model, x = model_of("2,3,4", text, one=np.float32(1))
    before = outputs_of(model, [x])[0]
    settle(model)
    assert "MatMul" in operators_in(model)
    np.testing.assert_array_equal(before, outputs_of(model, [x])[0])


@pytest.mark.parametrize("mean", ["axes, keepdims=1", "axes, keepdims=0", "negative, keepdims=0"])
def test_a_mean_over_places_is_a_pool(mean: str) -> None:
    axes, keeps = mean.split(", ")
    text = IN + f"n = ReduceMean<{keeps}>(d, {axes}) m = Flatten(n)" + OUT
    constants = {"axes": np.asarray([2, 3]), "negative": np.asarray([-1, -2]), "o": np.float32(0.02)}
    model, x = model_of("2,4,5,3", text, **constants)
    before = outputs_of(model, [x])[0]
    check(settle(model))
    assert np.abs(outputs_of(model, [x])[0] - before).max() <= 0.02 * 1.01
    run = operators_of(model, [x])
    assert run["QLinearGlobalAveragePool"] == 1
    assert run["ReduceMean"] == 0


@pytest.mark.parametrize(("axes", "step"), [([2], 0.02), ([1, 2, 3], 0.02), ([2, 3], 1e-5), ([2, 3], 10.0)], ids=str)
def test_other_means_stay_means(axes: list[int], step: float) -> None:
    """Those over other places; and those whose grids the kernel of ONNX Runtime refuses when it runs."""
    text = IN + "m = ReduceMean(d, axes)" + OUT
    model, x = model_of("2,4,5,3", text, axes=np.asarray(axes), o=np.float32(step))
    before = outputs_of(model, [x])[0]
    settle(model)
    assert "ReduceMean" in operators_in(model)
    np.testing.assert_array_equal(before, outputs_of(model, [x], fused=True)[0])


def test_weights_with_one_zero_point_load_in_exact_mode() -> None:
    text = IN + ROWS + "m = Gemm<transB=1>(d, w, b) p = QuantizeLinear(m, o, z) e = DequantizeLinear(p, o, z) "
    text += "v = DequantizeLinear<axis=0>(k2, ks, kz) n = Gemm<transB=1>(e, v) r = QuantizeLinear(n, o, z) "
    text += "y = DequantizeLinear(r, o, z)"
    model, x = model_of("3,4", text, k2=NUMBERS.integers(-127, 128, (5, 5)).astype(np.int8), o=np.float32(0.1))
    before = outputs_of(model, [x])[0]
    settle(model)
    assert operators_of(model, [x])["QGemm"] == 2
    assert np.abs(outputs_of(model, [x], fused=True)[0] - before).max() <= 0.3
