# SPDX-License-Identifier: Apache-2.0
"""Whether an ONNX file computes what a model does: ONNX Runtime beside torch on the same inputs."""

import contextlib
import copy
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxslim.errors import ConfigError, ExportError
from fxslim.export.onnx_packages import onnx_package
from fxslim.graph.inputs import Inputs, as_inputs, output_tensors
from fxslim.graph.recording import undisturbed
from fxslim.nn.quantizers import ActivationQuantizer
from fxslim.nn.quantizers.fixed_quantizers import FixedQuantizer

# Products of two pairs of bytes are summed in 16 bits by processors without these instructions.
_SAFE_FLAGS = frozenset("avx512_vnni avx_vnni avx_vnni_int8 amx_int8".split())

_ONNX_TYPES = {
    torch.float32: "float", torch.float64: "double", torch.float16: "float16", torch.bool: "bool",
    torch.int8: "int8", torch.int16: "int16", torch.int32: "int32", torch.int64: "int64",
    torch.uint8: "uint8", torch.uint16: "uint16", torch.uint32: "uint32", torch.uint64: "uint64",
    torch.complex64: "complex64", torch.complex128: "complex128",
}  # fmt: skip

# What a sum over some hundreds of products is off by, rounded one by one.
_SOME_LAST_PLACES = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class OutputAgreement:
    """One output: the largest difference, the relative L2 error, and how often the largest entry of a row is the same.

    ``steps``: the largest difference in steps of the output's grid; None where the output is on none.
    """

    name: str
    largest: float
    relative: float
    argmax: float
    steps: float | None = None


@dataclass(frozen=True, kw_only=True)
class OnnxVerification:
    """How far ONNX Runtime is from torch, over all inputs.

    ``outputs``: of the file as the runtime optimizes it, with exact products of integers; ``relative_here``: the same
    as it is on this machine, larger where ``saturates``, since processors without VNNI sum pairs of products in 16
    bits. ``relative_one_by_one``: of the operators one by one, in float between Q and DQ. ``rounding``: how far torch
    is from itself in float64, or with inputs, and what is put on grids, moved by some last places, relative L2: a value
    between two steps may fall to either side, and every layer behind it hears of that; only where all of the arithmetic
    is in integers a file can be nearer.
    ``refused``: what the runtime says where it loads the file only with its optimizations switched off.
    ``with_float_biases``: ``relative_one_by_one`` without the rounding of biases to int32, where export_onnx looked for
    what sets a file apart.
    """

    path: str
    outputs: tuple[OutputAgreement, ...]
    rounding: float
    relative_one_by_one: float
    relative_here: float
    saturates: bool
    refused: str = ""
    with_float_biases: float | None = None

    @property
    def relative(self) -> float:
        """The largest relative L2 error of any output."""
        return max((one.relative for one in self.outputs), default=0.0)

    @property
    def argmax(self) -> float:
        """The least agreement of largest entries of any output."""
        return min((one.argmax for one in self.outputs), default=1.0)

    def __str__(self) -> str:
        lines = [f"{self.path}, ONNX Runtime beside torch:"]
        for one in self.outputs:
            steps = "" if one.steps is None else f" ({one.steps:.3g} steps)"
            lines.append(
                f"  {one.name}: relative L2 {one.relative:.2g}, largest difference {one.largest:.3g}{steps}, "
                f"same argmax {one.argmax:.2%}"
            )
        if not self.refused:
            lines.append(f"  operators one by one, without optimizations: relative L2 {self.relative_one_by_one:.2g}")
        if self.with_float_biases is not None:
            lines.append(f"  so without the rounding of biases to int32: relative L2 {self.with_float_biases:.2g}")
        lines.append(
            f"  torch differs from itself by {self.rounding:.2g}, in float64 or with numbers moved by some last places"
        )
        if not max(self.relative, self.relative_one_by_one) < float("inf"):
            lines.append("  NaN or infinity on one side only: look for them in the inputs, the weights and the outputs")
        if self.refused:
            lines.append(f"  loaded only with graph_optimization_level ORT_DISABLE_ALL: {self.refused}")
        elif self.saturates:
            lines.append(
                f"  on this processor, which has no VNNI, relative L2 {self.relative_here:.2g}: sums of two products "
                "may saturate; WeightQuant(reduce_range=True) avoids it, or session.x64quantprecision=1 in the session"
            )
        return "\n".join(lines)


def verify_onnx(model: nn.Module, path: str | Path, inputs: Any) -> OnnxVerification:
    """Run a file on the CPU, and the model in eval mode, on the same inputs; a list is several inputs.

    The model's modes and buffers stay as they are.
    """
    path, saturates = Path(path), not has_exact_products()
    exact, refused = _session(path, optimized=False), ""
    try:
        here = _session(path)
        optimized = _session(path, precise=True) if saturates else here
    except ExportError as error:
        here, optimized, refused = exact, exact, str(error)
    examples = as_inputs(inputs)
    feeds = [_feed(exact, path, one) for one in examples]
    wanted = _outputs(model, examples)
    found = {session: [_run(session, path, feed) for feed in feeds] for session in {exact, optimized, here}}
    names, steps = [output.name for output in exact.get_outputs()], _output_steps(path)
    columns = [_column(wanted, place, path) for place in range(len(names))]

    def apart(session: Any) -> float:
        return max((_relative(one, _column(found[session], k, path)) for k, one in enumerate(columns)), default=0.0)

    return OnnxVerification(
        path=str(path),
        outputs=tuple(
            _agreement(name, columns[place], _column(found[optimized], place, path), steps.get(name))
            for place, name in enumerate(names)
        ),
        rounding=_rounding(model, examples, wanted),
        relative_one_by_one=apart(exact),
        relative_here=apart(here),
        saturates=saturates,
        refused=refused,
    )


def _outputs(model: nn.Module, examples: list[Inputs]) -> list[list[Tensor]]:
    found = []
    for one in examples:
        with undisturbed(model, training=False), torch.no_grad():
            found.append([value.detach().cpu() for value in output_tensors(one.copied().run(model))])
    return found


def _rounding(model: nn.Module, examples: list[Inputs], wanted: list[list[Tensor]]) -> float:
    """The model beside itself: in float64, where its code knows that, and with all that is rounded moved a little."""
    others = []
    for way in (1, -1):
        factor = 1 + way * _SOME_LAST_PLACES
        with _moved_before_rounding(model, factor):
            others.append(_outputs(model, [one.with_tensors(partial(_times, factor=factor)) for one in examples]))
    # A precision that the model's code does not know tells nothing.
    with contextlib.suppress(Exception):
        others.append(_outputs(copy.deepcopy(model).double(), [one.in_double() for one in examples]))
    return max(
        (
            _relative(list(one), list(two))
            for other in others
            for one, two in zip(zip(*wanted, strict=False), zip(*other, strict=False), strict=False)
        ),
        default=0.0,
    )


@contextlib.contextmanager
def _moved_before_rounding(model: nn.Module, factor: float) -> Iterator[None]:
    """Meanwhile quantizers of activations see what sums in another order may come to."""

    def move(quantizer: Any, args: Any) -> Any:
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.forget_sums()
        return (_times(args[0], factor), *args[1:])

    hooks = [
        module.register_forward_pre_hook(move)
        for module in model.modules()
        if isinstance(module, ActivationQuantizer | FixedQuantizer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _times(x: Tensor, factor: float) -> Tensor:
    return x * factor if x.is_floating_point() else x


def has_exact_products() -> bool:
    """Whether this processor sums products of bytes in 32 bits: not so on x86 without VNNI or AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "i386"):
        return True
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not _SAFE_FLAGS.isdisjoint(flags.split())


def _session(path: Path, *, optimized: bool = True, precise: bool = False) -> Any:
    onnxruntime = onnx_package("onnxruntime")
    if not path.is_file():
        raise ExportError(f"{path} is no file: export_onnx(model, inputs, path) writes one")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if precise:
        # Kernels whose sums do not saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime {onnxruntime.__version__} does not load {path}: {error}; its kernels compute in float32 and "
            "float16: of a model in another type, export model.float()"
        ) from error


def _feed(session: Any, path: Path, inputs: Inputs) -> dict[str, numpy.ndarray]:
    known = session.get_inputs()
    given = [value for value in tree_leaves((inputs.args, inputs.kwargs)) if isinstance(value, Tensor)]
    if len(given) != len(known):
        raise ConfigError(
            f"{path} takes {len(known)} inputs ({', '.join(one.name for one in known)}), {inputs} has {len(given)} "
            "tensors"
        )
    if not any(value.numel() for value in given):
        raise ConfigError(f"{inputs} holds no value: nothing could be compared")
    for one, value in zip(known, given, strict=True):
        fixed = [size if isinstance(size, int) else None for size in one.shape]
        if len(fixed) != value.dim() or any(f not in (None, s) for f, s in zip(fixed, value.shape, strict=True)):
            raise ConfigError(
                f"{path}: input {one.name} is {list(one.shape)}, got {list(value.shape)}; sizes that change need "
                "dynamic_shapes= when the file is written"
            )
        kind = _ONNX_TYPES.get(value.dtype)
        if f"tensor({kind})" != one.type:
            raise ConfigError(
                f"{path}: input {one.name} is {one.type}, got {value.dtype}: give it the dtype with which the file was "
                "written" + ("" if kind else ", one that NumPy knows")
            )
    return {one.name: value.detach().cpu().numpy() for one, value in zip(known, given, strict=True)}


def _run(session: Any, path: Path, feed: dict[str, numpy.ndarray]) -> list[Tensor]:
    try:
        return [torch.from_numpy(numpy.asarray(value).copy()) for value in session.run(None, feed)]
    except Exception as error:
        raise ExportError(f"ONNX Runtime can't run {path}: {error}") from error


def _column(rows: list[list[Tensor]], place: int, path: Path) -> list[Tensor]:
    if any(len(row) <= place for row in rows):
        raise ExportError(f"{path} has {place + 1} outputs or more, the model {min(map(len, rows))}")
    return [row[place] for row in rows]


def _agreement(name: str, wanted: list[Tensor], got: list[Tensor], step: float | None) -> OutputAgreement:
    for one, other in zip(wanted, got, strict=True):
        if one.shape != other.shape:
            raise ExportError(f"output {name} is {tuple(other.shape)}, the model's is {tuple(one.shape)}")
    largest = max(
        (float(_apart(a.double(), b.double()).max()) for a, b in zip(wanted, got, strict=True) if a.numel()),
        default=0.0,
    )
    rows = [(a.flatten(0, -2), b.flatten(0, -2)) for a, b in zip(wanted, got, strict=True) if a.dim() > 1 and a.numel()]
    same = torch.cat([a.double().argmax(-1) == b.double().argmax(-1) for a, b in rows]) if rows else torch.ones(1)
    return OutputAgreement(
        name=name, largest=largest, relative=_relative(wanted, got), argmax=float(same.float().mean()),
        steps=None if step is None else largest / step,
    )  # fmt: skip


def _relative(wanted: list[Tensor], got: list[Tensor]) -> float:
    one, other = (torch.cat([value.double().flatten() for value in values]) for values in (wanted, got))
    size, apart = one[one.isfinite()].norm(), _apart(one, other).norm()
    return float(apart / size) if size > 0 else float(apart)


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Differences; none between the same infinities or NaN on both sides, infinite where only one side has them."""
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _output_steps(path: Path) -> dict[str, float]:
    """Scales of the grids that outputs are on, through operators that move values."""
    ir = onnx_package("onnx_ir")
    graph, found = ir.load(str(path)).graph, {}
    for output in graph.outputs:
        node = output.producer()
        while node is not None and node.op_type in ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"):
            node = node.inputs[0].producer()
        if node is not None and node.op_type == "DequantizeLinear":
            scale = node.inputs[1].const_value
            if scale is not None and scale.size == 1:
                found[output.name] = float(scale.numpy().reshape(-1)[0])
    return found
