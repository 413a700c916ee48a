# SPDX-License-Identifier: Apache-2.0
"""Writes a model as an ONNX file that runtimes compute in integers."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from fxslim.errors import ConfigError, ExportError, unknown_name
from fxslim.export.ascend_form import build_ascend_form
from fxslim.export.bias_rounding import is_rounding, largest_bias_error
from fxslim.export.fake_quant_form import build_fake_quant_form
from fxslim.export.file_places import in_place, kept_aside
from fxslim.export.four_bit_weights import pack_four_bits
from fxslim.export.model_copies import deployed_copy
from fxslim.export.onnx_programs import onnx_model, save_onnx
from fxslim.export.onnx_verification import OnnxVerification, verify_onnx
from fxslim.export.passes import settle
from fxslim.export.qdq_files import load_qdq
from fxslim.export.saved_models import save_models
from fxslim.graph.inputs import Inputs, as_inputs
from fxslim.graph.refusals import refuse_wrapped, without_compile_wrapper
from fxslim.nn.quantizers import each_activation_quantizer
from fxslim.nn.quantizers.fixed_quantizers import check_calibrated
from fxslim.nn.quantizers.onnx_lowering import check_format
from fxslim.plan.applied_plans import applied
from fxslim.quantization.targets import as_target
from fxslim.version import __version__

_NOT_RUNNABLE = ("deploy", "ascend")
# Two runs that round differently are apart by more than either is from the exact one.
_TIMES_ROUNDING = 3.0
FORMS = ("qdq", "fake_quant", "deploy", "ascend")


def export_onnx(
    model: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    form: str = "qdq",
    target: str | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    verify: bool = True,
    tolerance: float = 0.01,
) -> OnnxVerification | None:
    """Write a model, quantized or not, as an ONNX file; returns how far ONNX Runtime is from torch on ``inputs``.

    ``form``: "qdq", with QuantizeLinear and DequantizeLinear; "fake_quant" and "deploy" (or "ascend"), those of AMCT
    (docs/ascend.md). ``target``: where given, it must be what the model was prepared for. ``dynamic_shapes``: as
    torch.export takes them. Of a list of ``inputs`` the first is exported, all are verified. Raises, and keeps the file
    aside, where it differs by more than ``tolerance`` (relative L2), or than three times what rounding changes in torch
    itself, and would with biases in float, too: integer kernels add int32 biases. The model stays as it is.
    """
    _check_wishes(form, target, tolerance)
    model, examples = _checked(model, target, form), as_inputs(inputs)
    with in_place(path) as temporary:
        copy = deployed_copy(model, examples[0])

        def write(place: Path, integer_biases: bool = True) -> Any:
            written = onnx_model(copy, examples[0], input_names, output_names, dynamic_shapes, opset)
            pack_four_bits(written, copy)
            # Only fused kernels want bounds between the two operators of a pair.
            runs = form == "qdq"
            settle(written, integer_biases=integer_biases, integer_bounds=runs, as_written=runs)
            _describe(written, model)
            save_onnx(written, place)
            return written

        written = write(temporary)
        if form != "qdq":
            _change_form(temporary, form)
        if not verify or form in _NOT_RUNNABLE:
            return None
        verification = verify_onnx(model, temporary, examples)
        if not _agrees(verification, tolerance) and form == "qdq":
            verification = _with_float_biases(verification, model, examples, written, write)
        if not _agrees(verification, tolerance):
            _refuse(verification, tolerance, temporary)
    return replace(verification, path=str(path))


def _check_wishes(form: str, target: str | None, tolerance: float) -> None:
    if form not in FORMS:
        raise ConfigError(unknown_name("form", form, FORMS))
    if target is not None:
        as_target(target)
    if not tolerance >= 0:
        raise ConfigError(f"tolerance={tolerance} is no relative error: give a number from 0 on, such as 0.01")


def _checked(model: nn.Module, target: str | None, form: str) -> nn.Module:
    """The model without a wrapper of torch.compile."""
    refuse_wrapped(model)
    model = without_compile_wrapper(model)
    _check_target(model, target, form)
    for quantizer in each_activation_quantizer(model).values():
        if quantizer.enabled:
            check_calibrated(quantizer)
            check_format(quantizer.config.format, quantizer.described())
    return model


def _with_float_biases(
    verification: OnnxVerification, model: nn.Module, examples: list[Inputs], written: Any, write: Callable[..., Any]
) -> OnnxVerification:
    """Whether rounded biases are what sets the file apart; the same as before where they are not merely rounded."""
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / "float_biases.onnx"
        if not is_rounding(largest_bias_error(written, write(twin, integer_biases=False))):
            return verification
        return replace(verification, with_float_biases=verify_onnx(model, twin, examples).relative_one_by_one)


def _check_target(model: nn.Module, target: str | None, form: str) -> None:
    prepared = {plan.target for plan in applied(model) if hasattr(plan, "target")}
    wanted = target if target is not None or form in ("qdq", "fake_quant") else "ascend"
    for name in sorted(prepared):
        if wanted is not None and name != wanted:
            raise ExportError(
                f"the model was prepared for {name!r}, whose grids are not those of {wanted!r}: prepare the float "
                f"model with target={wanted!r}, or export without target= in form 'qdq'"
            )


def _describe(written: Any, model: nn.Module) -> None:
    """What was done to the model, for whoever finds the file."""
    written.producer_name, written.producer_version = "fxslim", __version__
    plans = [plan.to_dict() for plan in applied(model) if hasattr(plan, "to_dict")]
    if plans:
        written.metadata_props["fxslim.plans"] = json.dumps(plans)


def _change_form(path: Path, form: str) -> None:
    source = load_qdq(path)
    if form == "fake_quant":
        save_models({path: (build_fake_quant_form(source), "fakequant")})
    else:
        save_models({path: (build_ascend_form(source), "deploy")})


def _agrees(verification: OnnxVerification, tolerance: float) -> bool:
    alone, whole = verification.with_float_biases, verification.relative_one_by_one
    allowed = max(tolerance, _TIMES_ROUNDING * verification.rounding)
    # Fused kernels round elsewhere: as far off again as rounding takes the operators one by one, and no further.
    return (whole if alone is None else alone) <= allowed and verification.relative <= max(allowed, 2 * whole)


def _refuse(verification: OnnxVerification, tolerance: float, made: Path) -> NoReturn:
    aside = kept_aside(made)
    verification = replace(verification, path=str(aside))
    raise ExportError(
        f"the file differs from the model by {max(verification.relative, verification.relative_one_by_one):.2g} "
        f"(relative L2; tolerance={tolerance}) and is "
        f"kept aside as {aside}\n{verification}"
    )
