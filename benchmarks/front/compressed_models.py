# SPDX-License-Identifier: Apache-2.0
"""fxslim's models for the front: what is trained on, and the files that are written of it."""

import copy
import itertools
from pathlib import Path
from typing import Any

from torch import nn

import fxslim
from benchmarks.front.places import ROUND_TO, Place
from benchmarks.tasks.masked_rows import masked_layers
from fxslim import QuantConfig
from fxslim.export import export_onnx
from fxslim.export.onnx_verification import has_exact_products
from fxslim.nn import WeightQuant

# Without VNNI, sums of products with weights of 8 bits saturate.
REDUCED = not has_exact_products()
INT8 = QuantConfig(weight=WeightQuant(reduce_range=REDUCED))


def unchanged(place: Place) -> nn.Module:
    return copy.deepcopy(place.base)


def pruned(place: Place, ratio: float) -> nn.Module:
    """With batch norms: the best of some settings, norms estimated anew. A transformer: repaired by least squares."""
    if place.net == "vit":
        return _pruned(place, ratio, heads="dim", repair="least_squares")
    choices = itertools.product(("l2", "taylor"), ("layer", "global"))
    return place.best(_pruned(place, ratio, importance=kind, scope=scope, repair="bn") for kind, scope in choices)


def _pruned(place: Place, ratio: float, **wishes: Any) -> nn.Module:
    return fxslim.prune(
        copy.deepcopy(place.base), place.example, ratio=ratio, data=place.batches, round_to=ROUND_TO, **wishes
    )


def quantized(place: Place) -> nn.Module:
    """Ready to train on its grids."""
    return fxslim.prepare_qat(
        copy.deepcopy(place.base), INT8, example_inputs=place.example, target="onnxruntime"
    )  # fmt: skip


def sparse(place: Place, pattern: str, ratio: float) -> nn.Module:
    """Masked in all layers that can follow the pattern but the first and the last."""
    layers = masked_layers(place.base, pattern)
    return fxslim.sparsify(copy.deepcopy(place.base), pattern, layers=layers, ratio=ratio)


def float_file(place: Place, model: nn.Module, path: Path) -> Path:
    return _exported(place, model, path)


def trained_grid_file(place: Place, model: nn.Module, path: Path) -> Path:
    return _exported(place, model, path, "onnxruntime")


def calibrated_file(place: Place, model: nn.Module, path: Path) -> Path:
    return _exported(place, _calibrated(place, model), path, "onnxruntime")


def _calibrated(place: Place, model: nn.Module) -> nn.Module:
    return fxslim.quantize(
        copy.deepcopy(model), INT8, data=place.batches, example_inputs=place.example, target="onnxruntime"
    )  # fmt: skip


def _exported(place: Place, model: nn.Module, path: Path, target: str | None = None) -> Path:
    path = path.with_suffix(".onnx")
    export_onnx(
        model, place.example, path, input_names=["x"], output_names=["y"], dynamic_shapes=({0: "batch"},), target=target
    )
    return path


def block_sparse_file(place: Place, model: nn.Module, path: Path) -> Path:
    """Of torch: layers that skip zero blocks."""
    return _converted(place, copy.deepcopy(model), path)


def int8_block_sparse_file(place: Place, model: nn.Module, path: Path) -> Path:
    return _converted(place, _calibrated(place, model), path)


def _converted(place: Place, model: nn.Module, path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    fxslim.save(fxslim.convert(model.eval(), example_inputs=place.example), path)
    return path
