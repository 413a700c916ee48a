# SPDX-License-Identifier: Apache-2.0
"""What convert_qat_model refuses: which node, which numbers, what to do; and that nothing is left behind."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from fxslim.errors import ExportError
from fxslim.export import convert_qat_model
from tests.export.qdq_models import QdqBuilder, one_layer, save

FLOAT = ("float32", [2, 2])
EYE = np.eye(2, dtype=np.int8)


def of(new: QdqBuilder, output: str = "y", opset: int = 17, kind: str = "float32") -> onnx.ModelProto:
    return new.model({"x": FLOAT}, {output: (kind, [None, None])}, opset)


def built(build: Callable[[QdqBuilder], object], **how) -> Callable[[], onnx.ModelProto]:
    def model() -> onnx.ModelProto:
        build(new := QdqBuilder())
        return of(new, **how)

    return model


def per_channel(kind: str) -> Callable[[], onnx.ModelProto]:
    def build(new: QdqBuilder) -> None:
        weight = new.stored("w", EYE, [1.0, 2.0], axis=1)
        new.node(kind, [new.activation("x", 0.5), weight], "y")

    return built(build)


def different_pair(new: QdqBuilder) -> None:
    q = new.quantizer("x", 0.5)
    new.node("DequantizeLinear", [q, *new.factors("other", 0.25, 3, "int8")], "y")


def different_weight_pair(new: QdqBuilder) -> None:
    q = new.quantizer(new.constant("w", np.eye(2, dtype=np.float32)), 0.5)
    weight = new.node("DequantizeLinear", [q, *new.factors("other", 0.5, 1, "int8")], "w_dq")
    new.node("MatMul", [new.activation("x", 0.5), weight], "y")


def half_scales(new: QdqBuilder) -> None:
    scale, zero = new.constant("s", np.float16(0.5)), new.constant("z", np.int8(0))
    half = new.node("Cast", ["x"], "half", to=onnx.TensorProto.FLOAT16)
    q = new.node("QuantizeLinear", [half, scale, zero], "q")
    new.node("Cast", [new.node("DequantizeLinear", [q, scale, zero], "dq")], "y", to=onnx.TensorProto.FLOAT)


def different_types(new: QdqBuilder) -> None:
    q = new.quantizer("x", 0.5, 0, "uint8")
    new.node("DequantizeLinear", [q, *new.factors("other", 0.5, -128, "int8")], "y")


def half_input() -> onnx.ModelProto:
    new = QdqBuilder()
    q = new.node("QuantizeLinear", ["x", *new.factors("f", 0.5, 0, "int8")], "q")
    new.node("DequantizeLinear", [q, "f_scale", "f_zero"], "y")
    model = of(new, opset=23)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return model


def weight(values: np.ndarray, kind: str = "MatMul", **grid) -> Callable[[], onnx.ModelProto]:
    def build(new: QdqBuilder) -> None:
        stored = new.stored("w", values, **{"scale": 1.0, **grid})
        new.node(kind, [new.activation("x", 0.5), stored], "y")

    return built(build)


def two_activations(new: QdqBuilder) -> None:
    x = new.activation("x", 0.5)
    new.node("MatMul", [x, new.activation(new.node("Relu", ["x"], "r"), 0.5)], "y")


def weight_alone(new: QdqBuilder) -> None:
    new.node("MatMul", ["x", new.stored("w", EYE, 1.0)], "y")


def gemm(bias: object = None, **attributes) -> Callable[[], onnx.ModelProto]:
    def build(new: QdqBuilder) -> None:
        inputs = [new.activation("x", 0.5), new.stored("w", EYE, 1.0)]
        if isinstance(bias, np.ndarray):
            inputs.append(new.constant("b", bias))
        elif bias:
            inputs.append(new.node("Relu", ["x"], "b"))
        new.node("Gemm", inputs, "y", **attributes)

    return built(build)


def channels_of_an_activation(new: QdqBuilder) -> None:
    new.activation("x", [0.5, 0.25], axis=1)


def computed_scale(new: QdqBuilder) -> None:
    scale = new.node("ReduceMax", ["x"], "s", keepdims=0)
    q = new.node("QuantizeLinear", ["x", scale], "q")
    new.node("DequantizeLinear", [q, scale], "y")


def read_by_another(new: QdqBuilder) -> None:
    new.node("Cast", [new.quantizer("x", 0.5)], "y", to=onnx.TensorProto.FLOAT)


def scale_of(value: float) -> Callable[[], onnx.ModelProto]:
    return built(lambda new: new.activation("x", value), output="x_dq")


def tiny_products(new: QdqBuilder) -> None:
    new.node("MatMul", [new.activation("x", 1e-30), new.stored("w", EYE, 1e-30)], "y")


def integers_given() -> onnx.ModelProto:
    new = QdqBuilder()
    new.node("DequantizeLinear", ["x", *new.factors("f", 0.5, 0, "int8")], "y")
    return new.model({"x": ("int8", [2, 2])}, {"y": FLOAT})


def inside_of_a_branch() -> onnx.ModelProto:
    inner = QdqBuilder()
    inner.activation("x", 0.5)
    branch = of(inner, "x_dq").graph
    del branch.input[:]
    branch.name = "branch"
    new = QdqBuilder()
    new.node("If", [new.constant("c", np.array(True))], "y", then_branch=branch, else_branch=branch)
    return of(new)


def inside_of_a_function() -> onnx.ModelProto:
    inner = QdqBuilder()
    inner.nodes.append(onnx.helper.make_node("QuantizeLinear", ["a", "b"], ["c"], name="hidden"))
    opset = [onnx.helper.make_opsetid("", 17)]
    new = QdqBuilder()
    new.activation("x", 0.5)
    model = of(new, "x_dq")
    model.functions.append(onnx.helper.make_function("own", "body", ["a", "b"], ["c"], inner.nodes, opset))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    return model


def deep_dilation() -> onnx.ModelProto:
    new = QdqBuilder()
    stored = new.stored("w", np.ones((1, 1, 2, 1, 1), np.int8), 1.0)
    new.node("Conv", [new.activation("x", 0.5), stored], "y", dilations=[2, 1, 1])
    five = ("float32", [1, 1, 4, 1, 1])
    return new.model({"x": five}, {"y": ("float32", [None] * 5)})


def sixteen_bits() -> onnx.ModelProto:
    return built(lambda new: new.activation("x", 0.5, 0, "uint16"), output="x_dq", opset=21)()


REFUSED = {
    "per channel Gemm": (per_channel("Gemm"), r"Gemm 'y_node': its weight has 2 scales; .* granularity=\"tensor\""),
    "per channel MatMul": (per_channel("MatMul"), r"MatMul 'y_node': its weight has 2 scales"),
    "pair": (
        built(different_pair),
        r"'x_q_node' has scale 0.5, zero point 0, int8, but .* 'y_node' behind it has scale 0.25, zero point 3, int8",
    ),
    "pair of a weight": (built(different_weight_pair), r"'w_q_node' has scale 0.5, zero point 0.* zero point 1"),
    "types of a pair": (built(different_types), r"zero point 0, uint8, but .* zero point -128, int8"),
    "float16 input": (half_input, r"QuantizeLinear 'q_node': its input 'x' is FLOAT16; only float32 models"),
    "float16": (built(half_scales), r"'q_node': its scale is float16; only float32 models"),
    "zero point": (weight(EYE, zero_point=-3), r"weight has zero point -3 \(int8\), expected 0: .* symmetric"),
    "unsigned zero point": (weight(np.eye(2, dtype=np.uint8)), r"weight has zero point 0 \(uint8\), expected 128"),
    "batched weight": (weight(EYE[None]), r"weight has shape \[1, 2, 2\], expected 2 dimensions"),
    "int32 weight": (weight(np.eye(2, dtype=np.int32)), r"its weight is int32, expected int8"),
    "scales do not fit": (weight(EYE, scale=[1.0, 2.0, 3.0], axis=0), r"3 scales along axis 0 .* shape \[2, 2\]"),
    "two activations": (built(two_activations), r"second input 'r_dq' is an activation; .* leave both inputs in float"),
    "weight alone": (built(weight_alone), r"its weight is quantized, but its input is not; .* skip this layer"),
    "alpha": (gemm(alpha=0.5), r"alpha=0.5, but integers need alpha=1.0"),
    "transA": (gemm(transA=1), r"transA=1, but integers need transA=0"),
    "computed bias": (gemm(bias=True), r"its bias 'b' is computed, expected a constant"),
    "matrix as bias": (gemm(bias=np.ones((2, 2), np.float32)), r"its bias has shape \[2, 2\], expected one number per"),
    "huge bias": (
        gemm(bias=np.float32([0, 3e9])),
        r"bias of channel 1 is 6e\+09 steps of 0.5, which int32 can't hold: leave this layer in float",
    ),
    "channels of an activation": (built(channels_of_an_activation, output="x_dq"), r"has 2 scales for an activation"),
    "computed scale": (built(computed_scale), r"its scale 's' is computed, expected a constant"),
    "read by another": (built(read_by_another), r"'x_q_node' is read by Cast 'y_node', expected a DequantizeLinear"),
    "scale 0": (scale_of(0.0), r"scale .*0\.0.* has no finite reciprocal; calibrate it again"),
    "scale nan": (scale_of(np.nan), r"scale .*nan.* has no finite reciprocal"),
    "scale too small": (scale_of(1e-39), r"scale .*1e-39.* has no finite reciprocal"),
    "tiny products": (built(tiny_products), r"scale of input 1e-30 x scale of weight is not a float32 above 0"),
    "integers given": (integers_given, r"'y_node' reads 'x', which is neither a constant nor the output of"),
    "branch": (inside_of_a_branch, r"QuantizeLinear 'x_q_node' is inside of 'branch'; only the main graph"),
    "function": (inside_of_a_function, r"QuantizeLinear 'hidden' is inside of 'body'; only the main graph"),
    "3d dilation": (deep_dilation, r"dilation 2 along depth, but a quantized 3d convolution needs 1 there"),
    "16 bits": (sixteen_bits, r"'x_q_node': integers of type uint16, expected int8 or uint8"),
    "old opset": (
        built(lambda new: new.activation("x", 0.5), output="x_dq", opset=10),
        r"opset 10 has no Round; .* 11",
    ),
    "no quantizers": (
        built(lambda new: new.node("Relu", ["x"], "y")),
        r"no QuantizeLinear and no Dequant.*prepare_qat",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path) -> None:
    model, message = REFUSED[name]
    path = tmp_path / "qdq.onnx"
    onnx.save(model(), path)
    with pytest.raises(ExportError, match=message) as caught:
        convert_qat_model(path, tmp_path / "new" / "m")
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [b"", b"no model at all", b"\x08\x0a\x12", bytes(range(256))], ids=["empty", "text", "cut", "bytes"]
)
def test_what_is_not_onnx(content, tmp_path) -> None:
    path = tmp_path / "qdq.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"qdq.onnx can't be read as ONNX"):
        convert_qat_model(path, tmp_path / "new" / "m")
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file(tmp_path) -> None:
    path = save(one_layer("Conv")[0], tmp_path / "qdq.onnx")
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ExportError, match=r"qdq.onnx"):
            convert_qat_model(path, tmp_path / "new" / "m")
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_whose_tensors_are_missing(tmp_path) -> None:
    path = tmp_path / "qdq.onnx"
    model = one_layer("Gemm")[0]
    onnx.save(model, path, save_as_external_data=True, location="gone.data", size_threshold=0)
    (tmp_path / "gone.data").unlink()
    with pytest.raises(ExportError, match=r"qdq.onnx can't be read as ONNX.*gone.data"):
        convert_qat_model(path, tmp_path / "m")


def test_no_file_and_a_file_of_ours(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"none.onnx is not a file"):
        convert_qat_model(tmp_path / "none.onnx", tmp_path / "m")
    with pytest.raises(ExportError, match="is not a file"):
        convert_qat_model(tmp_path, tmp_path / "m")
    fake, deploy = convert_qat_model(save(one_layer("Conv")[0], tmp_path / "qdq.onnx"), tmp_path / "m")
    with pytest.raises(ExportError, match=r"is converted already: it holds AscendQuant 'y_node.quant'"):
        convert_qat_model(deploy, tmp_path / "again")
    with pytest.raises(ExportError, match="would overwrite the file that is converted"):
        convert_qat_model(fake, tmp_path / "m")
    with pytest.raises(ExportError, match="no QuantizeLinear"):
        convert_qat_model(fake, tmp_path / "again")


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch) -> None:
    path = save(one_layer("Conv")[0], tmp_path / "qdq.onnx")
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "deploy" in self.name:
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match="No space left on device; nothing was left there"):
        convert_qat_model(path, tmp_path / "new" / "deep" / "m")
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_when_the_second_file_can_not_arrive(tmp_path) -> None:
    path = save(one_layer("Conv")[0], tmp_path / "qdq.onnx")
    (tmp_path / "m_fake_quant_model.onnx").mkdir()
    with pytest.raises(ExportError, match="can't be written"):
        convert_qat_model(path, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m_fake_quant_model.onnx", "qdq.onnx"]


def test_a_file_in_the_way_of_the_folder(tmp_path) -> None:
    path = save(one_layer("Conv")[0], tmp_path / "qdq.onnx")
    with pytest.raises(ExportError, match=r"the folder .*qdq.onnx/deep can't be made"):
        convert_qat_model(path, path / "deep" / "m")
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_package(tmp_path, monkeypatch) -> None:
    path = save(one_layer("Conv")[0], tmp_path / "qdq.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"convert_qat_model needs the package onnx: pip install 'fxslim\[onnx\]'"):
        convert_qat_model(path, tmp_path / "m")
