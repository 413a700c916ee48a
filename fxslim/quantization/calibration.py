# SPDX-License-Identifier: Apache-2.0
"""Ranges from data, without training: the user's own forwards, or batches."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxslim.batches import Data, Forward, as_data, repeatable
from fxslim.errors import CalibrationError, ConfigError
from fxslim.graph.inputs import Inputs
from fxslim.graph.refusals import without_compile_wrapper
from fxslim.graph.surgery.changes import Changes, all_or_nothing
from fxslim.nn import ActivationQuant, as_quant_config
from fxslim.nn.quant_config import CALIBRATIONS
from fxslim.nn.quantizers import ActivationQuantizer, WeightQuantizer, each_activation_quantizer
from fxslim.plan.applied_plans import applied
from fxslim.progress import track
from fxslim.quantization.cleared_grids import clear_grids
from fxslim.quantization.planning import plan_quantization
from fxslim.quantization.quantization_plan import QuantizationPlan


@contextlib.contextmanager
def calibrating(model: nn.Module) -> Iterator[nn.Module]:
    """The user's own forwards inside choose the ranges of all activations, at the end; meanwhile all is in float.

    Each quantizer must see as many batches as its config's ``batch_num``. After an error ranges are as they were.

    >>> import fxslim
    >>> net = fxslim.prepare_qat(nn.Sequential(nn.Linear(4, 2)))
    >>> with fxslim.calibrating(net):
    ...     _ = net(torch.tensor([[-1.0, 0.0, 2.0, 3.0]]))
    >>> [round(float(clip.detach()), 1) for clip in net[0].input_quantizer.clips()]
    [-1.0, 3.0]
    """
    quantizers = each_activation_quantizer(without_compile_wrapper(model))
    if not quantizers:
        raise ConfigError("no activation of this model is quantized: prepare_qat(model) or quantize(model) first")
    weights = [module for module in model.modules() if isinstance(module, WeightQuantizer)]
    for quantizer in quantizers.values():
        quantizer.start_collecting()
    for weight in weights:
        weight.is_passing = True
    try:
        yield model
        _check_batches(quantizers)
        for quantizer in quantizers.values():
            quantizer.finish_calibration()
    finally:
        for quantizer in quantizers.values():
            quantizer.stop_collecting()
        for weight in weights:
            weight.is_passing = False
    for part in model.modules():
        for plan in applied(part):
            if isinstance(plan, QuantizationPlan):
                clear_grids(part, plan.inputs)


def _check_batches(quantizers: Mapping[str, ActivationQuantizer]) -> None:
    """Everything was reached, often enough."""
    missing = [q.described() for q in quantizers.values() if not q.batches_collected]
    if missing:
        raise CalibrationError(
            f"{len(missing)} of {len(quantizers)} activations saw no data: {', '.join(missing[:5])}; run forwards that "
            "reach them, or leave these layers in float"
        )
    for quantizer in quantizers.values():
        if quantizer.batches_collected < quantizer.config.batch_num:
            raise CalibrationError(
                f"{quantizer.described()} saw {quantizer.batches_collected} batches, and its config's batch_num is "
                f"{quantizer.config.batch_num}: give more data, or a smaller batch_num"
            )


def quantize(
    model: nn.Module,
    config: Any = "int8",
    *,
    data: Iterable[Any],
    forward: Forward | None = None,
    calibration: str = "mse",
    example_inputs: Any = None,
    **wishes: Any,
) -> nn.Module:
    """Quantize after training: ranges of activations from ``data``, weights as they are; in place, returns the model.

    ``calibration``: min_max, moving_average, percentile, mse, ifmr, hfmg or entropy; weights alone need none.
    ``wishes`` are those of ``plan_quantization``. ``forward(model, batch)`` runs a batch. Training may go on from
    here: weights train straight through. After any error the model is as it was.
    """
    if calibration not in CALIBRATIONS:
        raise ConfigError(f"calibration must be one of {', '.join(CALIBRATIONS)}, got {calibration!r}")
    given = repeatable(as_data(data, forward))
    inputs = example_inputs if example_inputs is not None else _first_inputs(given, forward)
    wishes = {"reached_only": True, **wishes}
    plan = plan_quantization(model, _static(config, calibration), example_inputs=inputs, **wishes)
    return all_or_nothing(model, lambda changes: _calibrated(model, plan, given, changes))


def _calibrated(model: nn.Module, plan: QuantizationPlan, data: Data, changes: Changes) -> None:
    plan.change_model(model, changes)
    if not plan.num_activations:
        return
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with calibrating(model), torch.no_grad():
            for number, batch in enumerate(track(data, "calibrating")):
                try:
                    data.forward(model, batch)
                except CalibrationError as error:
                    raise CalibrationError(f"batch {number} of data: {error}") from error
    finally:
        for module, mode in was_training.items():
            module.training = mode


def _static(config: Any, calibration: str) -> Any:
    """The config with ranges that calibration finds."""
    if isinstance(config, list | tuple):
        return [_static(entry, calibration) for entry in config]
    found = as_quant_config(config)
    return replace(
        found,
        activation=_of_calibration(found.activation, calibration),
        output=_of_calibration(found.output, calibration),
    )


def _of_calibration(config: ActivationQuant | None, calibration: str) -> ActivationQuant | None:
    return None if config is None else replace(config, method="static", calibration=calibration)


def _first_inputs(data: Data, forward: Forward | None) -> Any:
    """The inputs of the first batch, where the model is called as usual; else each layer quantizes its own input."""
    if forward is not None:
        return None
    batch = next(iter(data))
    given = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if isinstance(given, Mapping):
        return Inputs(**given)
    return Inputs(*given) if isinstance(given, tuple) else Inputs(given)
