# SPDX-License-Identifier: Apache-2.0
"""The Ascend form written as standard float operators, read from the file alone: what its integers compute."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


def unpack(parameter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The float32 scale of products and the weight's offset."""
    scale = (parameter & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    return scale, ((parameter >> np.uint64(32)) & np.uint64(0xFF)).astype(np.uint8).view(np.int8)


def simulate(deploy: onnx.ModelProto) -> onnx.ModelProto:
    """Every integer tensor becomes the float of the same value, less the offset of its AscendQuant."""
    model, nodes = onnx.ModelProto(), []
    model.CopyFrom(deploy)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    outputs = {o.name: o for o in model.graph.output}
    made: dict[str, np.ndarray] = {}

    def node(kind: str, inputs: list, output: str, **attributes) -> str:
        for i, value in enumerate(inputs):
            if not isinstance(value, str):
                inputs[i] = f"{output}_{kind}_{i}"
                made[inputs[i]] = np.asarray(value, np.float32)
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    producers = {output: n for n in deploy.graph.node for output in n.output}
    for old in deploy.graph.node:
        values = {a.name: helper.get_attribute_value(a) for a in old.attribute}
        x, y = old.input[0], old.output[0]
        if old.op_type == "AscendQuant":
            assert values["dst_type"] == b"INT8"
            steps = node("Round", [node("Mul", [x, values["scale"]], f"{y}_1")], f"{y}_2")
            clipped = node("Clip", [node("Add", [steps, values["offset"]], f"{y}_3"), -128, 127], f"{y}_4")
            node("Sub", [clipped, values["offset"]], f"{y}_centred")
            if y in outputs:
                node("Cast", [clipped], y, to=onnx.TensorProto.INT8)
        elif old.op_type == "AscendAntiQuant":
            assert values["offset"] == attribute(producers[x], "offset")
            node("Mul", [f"{x}_centred", values["scale"]], y)
        elif old.op_type == "AscendDequant":
            scale, offset = unpack(stored[old.input[1]])
            assert not offset.any()
            assert values["dtype"] == 0
            if producers[x].op_type.startswith("Conv"):
                scale = scale.reshape(-1, 1, 1)
            node("Mul", [x, scale], y)
        elif x in producers and producers[x].op_type == "AscendQuant":
            assert stored[old.input[1]].dtype == np.int8
            assert len(old.input) < 3 or stored[old.input[2]].dtype == np.int32
            node(old.op_type, [f"{x}_centred", *(stored[name] for name in old.input[1:])], y, **values)
        else:
            nodes.append(old)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in made.items())
    return model


def attribute(node: onnx.NodeProto, name: str):
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def describe(model: onnx.ModelProto) -> str:
    """Nodes, attributes and constants as text; unsigned integers in hexadecimal."""
    lines = []
    for node in model.graph.node:
        values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        shown = " ".join(f"{k}={v.decode() if isinstance(v, bytes) else v}" for k, v in sorted(values.items()))
        lines.append(
            f"{node.op_type} {node.name}: {', '.join(node.input)} -> {', '.join(node.output)} | {shown}".rstrip()
        )
    for tensor in sorted(model.graph.initializer, key=lambda t: t.name):
        array = numpy_helper.to_array(tensor)
        numbers = [hex(v) if array.dtype == np.uint64 else v for v in array.reshape(-1).tolist()]
        lines.append(f"{tensor.name}: {array.dtype} {list(array.shape)} {' '.join(map(str, numbers))}")
    for output in model.graph.output:
        kind = onnx.TensorProto.DataType.Name(output.type.tensor_type.elem_type)
        lines.append(f"output {output.name}: {kind}")
    return "\n".join(lines) + "\n"
