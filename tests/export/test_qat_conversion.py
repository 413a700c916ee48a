# SPDX-License-Identifier: Apache-2.0
"""convert_qat_model: both files compute what the QDQ file computes, and the Ascend form is as documented."""

import logging
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import example, given
from onnx import numpy_helper

from fxslim.export import convert_qat_model, saved_models
from fxslim.export.ascend_form import build_ascend_form
from fxslim.export.fake_quant_form import build_fake_quant_form
from fxslim.export.qdq_files import read_qdq
from tests.export.qdq_models import QdqBuilder, one_layer, run, save
from tests.export.simulated_ascend import describe, simulate, unpack

GOLDEN = Path(__file__).parent / "golden" / "ascend_form.txt"
LAYERS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


def converted(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Both forms; the first passes ONNX's checker with the types of all tensors."""
    source = read_qdq(model)
    fake = build_fake_quant_form(source)
    onnx.checker.check_model(fake, full_check=True)
    return fake, build_ascend_form(source)


@st.composite
def quantized_layers(draw: st.DrawFn, exact: bool) -> tuple[onnx.ModelProto, np.ndarray, float]:
    """A layer, an input, and the largest step of its products. Exact: scales are powers of two, bias is int32."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))

    def scales(count: int | None) -> np.ndarray:
        powers = np.exp2(rng.integers(-9, 3, count))
        return np.float32(powers if exact else powers * rng.uniform(1, 2, count))

    kind, dtype = draw(st.sampled_from(LAYERS)), draw(st.sampled_from(["int8", "uint8"]))
    groups = draw(st.integers(1, 3)) if kind.startswith("Conv") else 1
    per_channel = kind.startswith("Conv") and draw(st.booleans())
    weight_scale = scales({"Conv": 3 * groups, "ConvTranspose": 3}[kind] if per_channel else None)
    bias = None
    if kind != "MatMul" and draw(st.booleans()):
        bias = rng.integers(-3000, 3000, 3 * groups).astype(np.int32)
        if not exact:
            bias = rng.normal(0, 3, 3 * groups).astype(np.float32)
    scale = scales(None)
    zero_point = draw(st.integers(0, 255)) - (128 if dtype == "int8" else 0)
    model, shape = one_layer(
        kind, dtype=dtype, scale=scale, zero_point=zero_point, weight_scale=weight_scale, bias=bias, groups=groups,
        seed=draw(st.integers(0, 99)), size=draw(st.integers(2, 6)),
    )  # fmt: skip
    return model, rng.normal(0, 80, shape).astype(np.float32) * scale, float(np.max(scale * weight_scale))


@given(quantized_layers(exact=True))
def test_both_forms_compute_what_the_file_computes(case) -> None:
    model, x, _ = case
    fake, deploy = converted(model)
    expected = run(model, x=x)
    np.testing.assert_array_equal(run(fake, x=x), expected)
    # A bias of integers is added before the products are scaled: the same sum in another order of roundings.
    np.testing.assert_allclose(run(simulate(deploy), x=x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@given(quantized_layers(exact=False))
def test_any_scale_and_a_float_bias(case) -> None:
    model, x, step = case
    fake, deploy = converted(model)
    # The input is put on its grid first: nothing then lies near a half, where 1/scale may round to the other side.
    source = next(iter(read_qdq(model).quantizers.values()))
    x = (np.rint(x / source.scale) * source.scale).astype(np.float32)
    expected, found = run(model, x=x), run(fake, x=x)
    room = 1e-5 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= step / 2 * (1 + 1e-5) + room
    np.testing.assert_allclose(run(simulate(deploy), x=x), found, rtol=1e-5, atol=room)


def quantized_output(scale: float, zero_point: int = 0, dtype: str = "int8") -> onnx.ModelProto:
    new = QdqBuilder()
    new.quantizer("x", scale, zero_point, dtype)
    return new.model({"x": ("float32", ["n"])}, {"x_q": (dtype, ["n"])})


@given(
    st.floats(2**-20, 2**10, width=32),
    st.integers(-128, 127),
    st.lists(st.integers(-300, 300), min_size=1, max_size=40),
    st.integers(0, 2**31),
)
@example(float(np.float32(0.4)), 0, list(range(-127, 127)), 0)
def test_a_step_differs_from_true_division_only_beside_a_half(scale, zero_point, whole, seed) -> None:
    scale = np.float32(scale)
    near = np.random.default_rng(seed).choice([-1e-7, 0, 1e-7, 0.3], len(whole))
    x = ((np.asarray(whole) + 0.5 + near) * np.float64(scale)).astype(np.float32)
    model = quantized_output(scale, zero_point)
    expected, found = run(model, x=x).astype(int), run(converted(model)[0], x=x).astype(int)
    steps = x.astype(np.float64) / np.float64(scale)
    beside = np.abs(np.abs(steps - np.floor(steps)) - 0.5) <= np.abs(steps) * 2.0**-22
    assert np.abs(found - expected).max() <= 1
    assert (found == expected)[~beside].all()


def test_a_step_can_differ() -> None:
    """The page says so: if this fails, the page should promise more."""
    differ = 0
    for scale in np.float32([0.1, 0.3, 0.7, 0.9]):
        x = ((np.arange(-127, 127) + 0.5) * np.float64(scale)).astype(np.float32)
        model = quantized_output(scale)
        differ += int((run(model, x=x) != run(converted(model)[0], x=x)).sum())
    assert differ > 0


def test_an_output_that_is_quantized_is_int8_in_both_forms() -> None:
    x = np.linspace(-30, 30, 99, dtype=np.float32)
    model = quantized_output(0.25, 100, "uint8")
    fake, deploy = converted(model)
    assert [node.op_type for node in deploy.graph.node] == ["AscendQuant"]
    assert describe(deploy).endswith("output x_q: INT8\n")
    expected = run(model, x=x).astype(int) - 128
    for form in (fake, simulate(deploy)):
        found = run(form, x=x)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_uint8_is_int8_with_every_number_128_less(kind) -> None:
    unsigned, _ = one_layer(kind, dtype="uint8", zero_point=140)
    signed, _ = one_layer(kind, dtype="int8", zero_point=12)
    for one, other in zip(converted(unsigned), converted(signed), strict=True):
        assert describe(one) == describe(other)


def test_a_uint8_weight_is_int8_with_every_number_128_less() -> None:
    forms = []
    for dtype, shift in (("int8", 0), ("uint8", 128)):
        new, integers = QdqBuilder(), np.array([[-128, 0], [5, 127]])
        weight = new.stored("w", (integers + shift).astype(dtype), 0.25, shift)
        new.node("MatMul", [new.activation("x", 0.5), weight], "y")
        forms.append(converted(new.model({"x": ("float32", [1, 2])}, {"y": ("float32", [1, 2])})))
    for one, other in zip(*forms, strict=True):
        assert describe(one) == describe(other)


@pytest.mark.parametrize("bias, integers", [
    (np.float32([0.26, -0.3]), [2, -2]),
    (np.float32([[0.26, -0.3]]), [2, -2]),
    (np.float32(0.25), [2, 2]),
    (np.float32([-0.25]), [-2, -2]),
])  # fmt: skip
def test_biases_of_gemm(bias, integers) -> None:
    new = QdqBuilder()
    weight = new.stored("w", np.eye(2, dtype=np.int8), 0.25)
    new.node("Gemm", [new.activation("x", 0.5), weight, new.constant("b", bias)], "y")
    fake, deploy = converted(new.model({"x": ("float32", [1, 2])}, {"y": ("float32", [1, 2])}))
    stored = {t.name: numpy_helper.to_array(t) for t in deploy.graph.initializer}["y_node.bias"]
    assert stored.dtype == np.int32
    assert stored.tolist() == integers
    np.testing.assert_array_equal(run(fake, x=np.zeros((1, 2), np.float32)), [np.float32(integers) / 8])


def test_an_int32_bias_on_another_grid_is_rounded() -> None:
    new = QdqBuilder()
    weight, bias = new.stored("w", np.eye(2, dtype=np.int8), 0.25), new.stored("b", np.array([3, -9], np.int32), 0.1)
    new.node("Gemm", [new.activation("x", 0.5), weight, bias], "y")
    _, deploy = converted(new.model({"x": ("float32", [1, 2])}, {"y": ("float32", [1, 2])}))
    stored = {t.name: numpy_helper.to_array(t) for t in deploy.graph.initializer}
    assert stored["y_node.bias"].tolist() == [2, -7]


def test_a_branch_reads_tensors_of_the_main_graph() -> None:
    inner = QdqBuilder()
    inner.node("Add", ["x_dq", "table_dq"], "inner")
    branch = inner.model({}, {"inner": ("float32", [1, 2])}).graph
    new = QdqBuilder()
    new.stored("table", np.array([[3, 4]], np.int8), 0.5)
    new.activation("x", 0.5)
    new.node("If", [new.constant("c", np.array(True))], "y", then_branch=branch, else_branch=branch)
    model = new.model({"x": ("float32", [1, 2])}, {"y": ("float32", [1, 2])})
    fake, deploy = converted(model)
    assert [node.op_type for node in deploy.graph.node] == ["AscendQuant", "AscendAntiQuant", "If"]
    x = np.float32([[1.2, 7.7]])
    for form in (fake, simulate(deploy)):
        np.testing.assert_array_equal(run(form, x=x), run(model, x=x))


def sum_of_two(second_quantized: bool) -> onnx.ModelProto:
    new = QdqBuilder()
    a = new.activation("a", 0.5, 3)
    b = new.activation("b", 0.25, 10, "uint8") if second_quantized else "b"
    new.node("Add", [a, b], "y")
    shape = ("float32", [2, 3])
    return new.model({"a": shape, "b": shape}, {"y": shape})


@pytest.mark.parametrize("second_quantized", [True, False])
def test_sums(second_quantized) -> None:
    model, rng = sum_of_two(second_quantized), np.random.default_rng(0)
    fake, deploy = converted(model)
    kinds = [node.op_type for node in deploy.graph.node]
    assert kinds == ["AscendQuant", "AscendAntiQuant"] * (1 + second_quantized) + ["Add"]
    a, b = rng.normal(0, 30, (2, 2, 3)).astype(np.float32)
    expected = run(model, a=a, b=b)
    np.testing.assert_array_equal(run(fake, a=a, b=b), expected)
    np.testing.assert_array_equal(run(simulate(deploy), a=a, b=b), expected)


def small_network() -> onnx.ModelProto:
    """Conv, ConvTranspose, Add of both, MatMul, Gemm; one grid read by a layer and by the sum."""
    new = QdqBuilder()
    x = new.activation("x", 0.5, 130, "uint8")
    weight = np.arange(-4, 4).reshape(2, 1, 2, 2).astype(np.int8)
    conv_weight = new.stored("conv_w", weight, [0.25, 0.5], axis=0)
    conv_bias = new.stored("conv_b", np.array([7, -9], np.int32), np.float32([0.125, 0.25]), axis=0)
    new.node("Conv", [x, conv_weight, conv_bias], "conv", strides=[2, 2])
    r = new.activation(new.node("Relu", ["conv"], "relu"), 0.125, -128)
    up_weight = new.stored("up_w", np.arange(1, 9).reshape(2, 1, 2, 2).astype(np.int8), [2.0], axis=1)
    up = new.node("ConvTranspose", [r, up_weight, new.constant("up_b", np.float32([0.75]))], "up", strides=[2, 2])
    both = new.node("Add", [x, new.activation(up, 1.0)], "both")
    flat = new.activation(new.node("Flatten", [both], "flat"), 4.0, 1)
    mixed_weight = new.stored("mixed_w", np.arange(-16, 16).reshape(16, 2).astype(np.int8), 0.5)
    mixed = new.activation(new.node("MatMul", [flat, mixed_weight], "mixed"), 8.0)
    last_weight = new.stored("last_w", np.array([[3, -3]], np.int8), 1.0)
    new.node("Gemm", [mixed, last_weight, new.constant("last_b", np.float32([24.0]))], "last", transB=1)
    new.quantizer("last", 16.0, 5)
    return new.model({"x": ("float32", [1, 1, 4, 4])}, {"last_q": ("int8", [1, 1])})


def test_golden_ascend_form() -> None:
    """Names of operators, attributes, packing; the network's numbers are chosen so that each can be checked by hand."""
    assert describe(converted(small_network())[1]) == GOLDEN.read_text()


def test_a_small_network_computes_the_same() -> None:
    model, rng = small_network(), np.random.default_rng(0)
    fake, deploy = converted(model)
    seen = set()
    for _ in range(20):
        x = rng.normal(0, 20, (1, 1, 4, 4)).astype(np.float32)
        expected = run(model, x=x)
        np.testing.assert_array_equal(run(fake, x=x), expected)
        np.testing.assert_array_equal(run(simulate(deploy), x=x), expected)
        seen.add(int(expected[0, 0]))
    assert len(seen) > 5


def test_floats_of_the_simulation_are_the_integers_of_the_other_file() -> None:
    fake, deploy = (
        {t.name: numpy_helper.to_array(t) for t in form.graph.initializer} for form in converted(small_network())
    )
    for layer, shape in (("conv_node", (2, 1, 1, 1)), ("up_node", (1, 1, 1, 1)), ("mixed_node", ()), ("last_node", ())):
        products, offset = unpack(deploy[f"{layer}.dequant.param"])
        assert not offset.any()
        input_scale = {"conv_node": 0.5, "up_node": 0.125, "mixed_node": 4.0, "last_node": 8.0}[layer]
        weight_scale = (products / np.float32(input_scale)).reshape(shape)
        np.testing.assert_array_equal(fake[f"{layer}.weight"], deploy[f"{layer}.weight"] * weight_scale)
        if layer != "mixed_node":
            np.testing.assert_array_equal(fake[f"{layer}.bias"], deploy[f"{layer}.bias"] * products)


def test_float_weights_behind_a_quantizer_are_rounded_as_the_runtime_does() -> None:
    rng, new = np.random.default_rng(3), QdqBuilder()
    x = new.activation("x", 0.1, 3)
    floats = rng.normal(0, 20, (4, 3)).astype(np.float32)
    weight = new.activation(new.constant("w", floats), 0.1)
    turned = new.node("Transpose", [weight], "turned", perm=[1, 0])
    new.node("MatMul", [x, turned], "y")
    model = new.model({"x": ("float32", [2, 3])}, {"y": ("float32", [2, 4])})
    x_value = np.float32([[0.1, -0.7, 2.0], [3.1, 0.0, -9.0]])
    fake, deploy = converted(model)
    np.testing.assert_array_equal(run(fake, x=x_value), run(model, x=x_value))
    stored = {t.name: numpy_helper.to_array(t) for t in deploy.graph.initializer}["y_node.weight"]
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, np.clip(np.rint(floats / np.float32(0.1)), -128, 127).T)


def test_scales_follow_a_transposed_weight() -> None:
    """AMCT's exporter writes a convolution's weight with its first two axes swapped, and scales along axis 1."""
    rng, new = np.random.default_rng(5), QdqBuilder()
    stored = new.stored("w", rng.integers(-9, 9, (2, 3, 1, 1)).astype(np.int8), [0.25, 0.5, 2.0], axis=1)
    turned = new.node("Transpose", [stored], "turned", perm=[1, 0, 2, 3])
    new.node("Conv", [new.activation("x", 0.5), turned], "y")
    model = new.model({"x": ("float32", [1, 2, 2, 2])}, {"y": ("float32", [1, 3, 2, 2])})
    x = rng.normal(0, 9, (1, 2, 2, 2)).astype(np.float32)
    for form in (converted(model)[0], simulate(converted(model)[1])):
        np.testing.assert_array_equal(run(form, x=x), run(model, x=x))


def test_a_quantized_constant_that_no_layer_reads_stays_float() -> None:
    new = QdqBuilder()
    table = new.stored(
        "table", np.arange(-6, 6).reshape(4, 3).astype(np.int8), [1.0, 2.0, 4.0, 8.0], [1, 0, 0, 0], axis=0
    )
    rows = new.node("Gather", [table, new.constant("rows", np.array([3, 0]))], "rows_of_it")
    new.node("Add", [new.activation("x", 0.5), rows], "y")
    model = new.model({"x": ("float32", [2, 3])}, {"y": ("float32", [2, 3])})
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    for form in (converted(model)[0], simulate(converted(model)[1])):
        np.testing.assert_array_equal(run(form, x=x), run(model, x=x))


def test_a_layer_with_a_float_weight_stays_float_and_says_so(caplog) -> None:
    new = QdqBuilder()
    new.node("MatMul", [new.activation("x", 0.5, 3), new.constant("w", np.float32([[0.1], [0.2], [0.3]]))], "y")
    model = new.model({"x": ("float32", [2, 3])}, {"y": ("float32", [2, 1])})
    fake, deploy = converted(model)
    assert "MatMul 'y_node' stays in float: its input is quantized, its weight is not" in caplog.text
    assert [node.op_type for node in deploy.graph.node] == ["AscendQuant", "AscendAntiQuant", "MatMul"]
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    for form in (fake, simulate(deploy)):
        np.testing.assert_array_equal(run(form, x=x), run(model, x=x))


def test_two_layers_share_a_weight_and_an_input() -> None:
    new = QdqBuilder()
    x = new.activation("x", 0.5)
    weight = new.stored("w", np.eye(3, dtype=np.int8), 1.0)
    new.node("Add", [new.node("MatMul", [x, weight], "one"), new.node("MatMul", [x, weight], "two")], "y")
    model = new.model({"x": ("float32", [2, 3])}, {"y": ("float32", [2, 3])})
    fake, deploy = converted(model)
    assert [n.op_type for n in deploy.graph.node].count("AscendQuant") == 1
    assert sum(t.data_type == onnx.TensorProto.INT8 for t in deploy.graph.initializer) == 1
    x_value = np.float32([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(run(fake, x=x_value), run(model, x=x_value))


def test_files_and_names(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(small_network(), tmp_path / "qdq.onnx")
    found = convert_qat_model("qdq.onnx", "./outputs/deep/lenet")
    assert [str(p) for p in found] == [f"outputs/deep/lenet_{kind}_model.onnx" for kind in ("fake_quant", "deploy")]
    assert all(p.is_file() for p in found)
    for prefix, folder in (("./bare/", "bare"), ("", ".")):
        assert [str(p) for p in convert_qat_model(path, prefix)] == [
            str(Path(folder) / "fake_quant_model.onnx"),
            str(Path(folder) / "deploy_model.onnx"),
        ]
    assert not list(tmp_path.rglob(".unfinished*"))
    x = np.ones((1, 1, 4, 4), np.float32)
    np.testing.assert_array_equal(run(found[0], x=x), run(path, x=x))


def test_metadata_stays(tmp_path) -> None:
    model = small_network()
    model.metadata_props.add(key="fxslim", value="plan")
    for path in convert_qat_model(save(model, tmp_path / "qdq.onnx"), tmp_path / "m"):
        assert [(p.key, p.value) for p in onnx.load(path).metadata_props] == [("fxslim", "plan")]


def test_what_is_there_is_overwritten_with_a_warning(tmp_path, caplog) -> None:
    path = save(small_network(), tmp_path / "qdq.onnx")
    first = [p.read_bytes() for p in convert_qat_model(path, tmp_path / "m")]
    with caplog.at_level(logging.WARNING, "fxslim"):
        second = [p.read_bytes() for p in convert_qat_model(path, tmp_path / "m")]
    assert first == second
    assert [r.getMessage().endswith("_model.onnx is overwritten") for r in caplog.records] == [True, True]


def test_large_tensors_lie_beside_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(saved_models, "LARGEST_BYTES", 100)
    monkeypatch.setattr(saved_models, "SMALLEST_EXTERNAL_BYTES", 30)
    path = save(small_network(), tmp_path / "qdq.onnx")
    fake, deploy = convert_qat_model(path, tmp_path / "out" / "m")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "conv_node.weight_fakequant.external",
        "m_deploy_model.onnx",
        "m_fake_quant_model.onnx",
        "mixed_node.weight_deploy.external",
        "mixed_node.weight_fakequant.external",
        "up_node.weight_fakequant.external",
    ]
    x = np.ones((1, 1, 4, 4), np.float32)
    np.testing.assert_array_equal(run(fake, x=x), run(path, x=x))
    assert describe(onnx.load(deploy)) == GOLDEN.read_text()
