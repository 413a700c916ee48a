# SPDX-License-Identifier: Apache-2.0
"""Random graphs of layers, sums, bounds, moves and pairs of Q and DQ."""

import random
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

GRIDS = [(0.02, 0), (0.05, 128), (0.0123, 37), (6 / 255, 0), (0.03, 3)]
Shape = tuple[int, ...]


class RandomGraph:
    """``model`` and its input; the same for the same seed."""

    def __init__(self, seed: int, size: int, exact: bool) -> None:
        self._random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._exact = exact
        for place, (scale, zero_point) in enumerate(GRIDS):
            self._constant(np.float32(scale), f"s{place}")
            self._constant(np.uint8(zero_point), f"z{place}")
        self.shape: Shape = (2, 4, 6, 6)
        self._values: list[tuple[str, Shape]] = [("x", self.shape)]
        for _ in range(size):
            self._grow()
        self.model = self._finish()
        self.x = self._numbers.normal(size=self.shape).astype(np.float32) * 3

    def _constant(self, array: np.ndarray, name: str = "") -> str:
        name = name or f"c{len(self._constants)}"
        self._constants.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def _add(self, operator: str, inputs: list[str], shape: Shape | None, count: int = 1, **attributes: object) -> str:
        names = [f"v{len(self._nodes)}_{place}" for place in range(count)]
        self._nodes.append(helper.make_node(operator, inputs, names, name=f"n{len(self._nodes)}", **attributes))
        if shape is not None:
            self._values += [(name, shape) for name in names]
        return names[0]

    def _pick(self) -> tuple[str, Shape]:
        return self._random.choice(self._values[-4:] if self._random.random() < 0.8 else self._values)

    def _grow(self) -> None:
        name, shape = self._pick()
        computing = [self._conv, self._bounds, self._add_two, self._leaky]
        moving = [self._max_pool, self._transpose, self._split, self._slice, self._join, self._reshape, self._pad]
        moving += [self._gather, self._resize, self._largest]
        kinds: list[list[Callable[[str, Shape], None]]] = [computing, moving, [self._pair], [self._pair]]
        self._random.choice(self._random.choice(kinds))(name, shape)

    def _pair(self, name: str, shape: Shape) -> None:
        place = self._random.randrange(len(GRIDS)) if self._random.random() < 0.4 else 0
        quantized = self._add("QuantizeLinear", [name, f"s{place}", f"z{place}"], None)
        self._add("DequantizeLinear", [quantized, f"s{place}", f"z{place}"], shape)

    def _conv(self, name: str, shape: Shape) -> None:
        weight = self._numbers.integers(-127, 128, size=(4, shape[1], 1, 1)).astype(np.int8)
        scale = (self._numbers.uniform(1, 2, size=4) / 300).astype(np.float32)
        inputs = [self._constant(weight), self._constant(scale), self._constant(np.zeros(4, np.int8))]
        weights = self._add("DequantizeLinear", inputs, None, axis=0)
        bias = [] if self._exact else [self._constant(self._numbers.normal(size=4).astype(np.float32))]
        self._add("Conv", [name, weights, *bias], (shape[0], 4, *shape[2:]), kernel_shape=[1, 1])

    def _bounds(self, name: str, shape: Shape) -> None:
        if self._random.random() < 0.5:
            self._add("Relu", [name], shape)
        else:
            ends = sorted(self._random.choices([0.0, 0.0, -1.0, 5.1, 6.0, 7.0], k=2))
            self._add("Clip", [name, *(self._constant(np.float32(end)) for end in ends)], shape)

    def _add_two(self, name: str, shape: Shape) -> None:
        self._add("Add", [name, self._random.choice([n for n, s in self._values if s == shape])], shape)

    def _leaky(self, name: str, shape: Shape) -> None:
        self._add("LeakyRelu", [name], shape, alpha=0.5)

    def _max_pool(self, name: str, shape: Shape) -> None:
        self._add("MaxPool", [name], shape, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def _transpose(self, name: str, shape: Shape) -> None:
        self._add("Transpose", [name], (shape[0], shape[1], shape[3], shape[2]), perm=[0, 1, 3, 2])

    def _split(self, name: str, shape: Shape) -> None:
        if shape[1] % 2 == 0:
            self._add("Split", [name], (shape[0], shape[1] // 2, *shape[2:]), 2, axis=1, num_outputs=2)

    def _slice(self, name: str, shape: Shape) -> None:
        ends = [self._constant(np.asarray([number], np.int64)) for number in (0, max(1, shape[1] - 1), 1)]
        self._add("Slice", [name, *ends], (shape[0], max(1, shape[1] - 1), *shape[2:]))

    def _join(self, name: str, shape: Shape) -> None:
        fitting = [(n, s) for n, s in self._values if s[2:] == shape[2:] and s[1] + shape[1] <= 12]
        if fitting:
            other, other_shape = self._random.choice(fitting[-4:])
            self._add("Concat", [name, other], (shape[0], shape[1] + other_shape[1], *shape[2:]), axis=1)

    def _reshape(self, name: str, shape: Shape) -> None:
        flat = self._constant(np.asarray([shape[0], -1], np.int64))
        rows = self._add("Reshape", [name, flat], None)
        self._add("Reshape", [rows, self._constant(np.asarray(shape, np.int64))], shape)

    def _pad(self, name: str, shape: Shape) -> None:
        if shape[1] < 8:
            self._add("Pad", [name, self._constant(np.asarray([0, 1, 0, 0, 0, 0, 0, 0], np.int64))],
                      (shape[0], shape[1] + 1, *shape[2:]))  # fmt: skip

    def _gather(self, name: str, shape: Shape) -> None:
        index = self._constant(self._numbers.integers(0, shape[1], size=3))
        self._add("Gather", [name, index], (shape[0], 3, *shape[2:]), axis=1)

    def _resize(self, name: str, shape: Shape) -> None:
        if shape[2] * shape[3] < 100:
            sizes = (shape[0], shape[1], shape[2] * 2, shape[3] * 2)
            scales = self._constant(np.asarray([1, 1, 2, 2], np.float32))
            self._add("Resize", [name, "", scales], sizes, mode="nearest", nearest_mode="floor")

    def _largest(self, name: str, shape: Shape) -> None:
        axes = self._constant(np.asarray([2], np.int64))
        self._add("ReduceMax", [name, axes], (*shape[:2], 1, shape[3]), keepdims=1)

    def _finish(self) -> ir.Model:
        read = {name for node in self._nodes for name in node.input}
        ends = [(name, shape) for name, shape in self._values if name not in read or self._random.random() < 0.05]
        ends = [(name, shape) for name, shape in ends if name != "x"] or [(self._add("Relu", ["x"], None), self.shape)]
        graph = helper.make_graph(
            self._nodes,
            "random",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in ends],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))
