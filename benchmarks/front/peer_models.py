# SPDX-License-Identifier: Apache-2.0
"""Other tools' models for the front: Torch-Pruning, torch.ao, plain masks, and ONNX Runtime's static quantizer."""

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

import fxslim
from benchmarks.front.compressed_models import REDUCED
from benchmarks.front.places import ROUND_TO, Place
from benchmarks.models.onnx_speed import write_theirs
from benchmarks.tasks import torch_ao_rows
from benchmarks.tasks.candidates import Candidate
from benchmarks.tasks.contest import EXAMPLE, repaired
from benchmarks.tasks.torch_pruning_rows import rival_candidates

CRITERIA = ("tp:magnitude", "tp:taylor")


def torch_pruning(place: Place, ratio: float) -> nn.Module:
    """The best of its criteria and settings, norms estimated anew, on images that the criteria did not see."""
    macs = round(fxslim.trace(place.base, EXAMPLE).cost.macs * (1 - ratio))
    found: list[Candidate] = []
    # Widths rounded like ours where its steps then come within 3 % of the macs; else in ones.
    for round_to in (ROUND_TO, None):
        for name in CRITERIA:
            found += rival_candidates(name, place.base, EXAMPLE, place.batches, macs, round_to)
        if found:
            break
    if not found:
        raise fxslim.FxslimError("none of its settings comes within 3 % of these macs")
    return place.best(repaired(candidate, place.batches) for candidate in found)


def plain_magnitude(place: Place, ratio: float) -> nn.Module:
    """torch.nn.utils.prune: the smallest weights of all layers together are held at 0."""
    # torch.nn.utils.prune takes no weights that lie channels_last.
    model = copy.deepcopy(place.base).to(memory_format=torch.contiguous_format)
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=ratio)
    return model


def torch_ao(place: Place) -> nn.Module:
    """Ready for QAT, for x86's kernels."""
    return torch_ao_rows.prepare_trained(place.base, place.example, 8, REDUCED)


def torch_ao_file(place: Place, model: nn.Module, path: Path) -> Path:
    """Converted to torch's integer kernels, traced: it writes no integer ONNX."""
    path = path.with_suffix(".pt")
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(torch_ao_rows.converted(model), place.example), path)
    return path


def plain_float_file(place: Place, model: nn.Module, path: Path) -> Path:
    """As torch writes it; masks become zeros of the weights."""
    for module in model.modules():
        if hasattr(module, "weight_orig"):
            prune.remove(module, "weight")
    # A file knows no memory formats, and torch's exporter writes more operators for channels_last.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    path = path.with_suffix(".onnx")
    torch.onnx.export(
        model, (place.example,), path, dynamo=True, external_data=False, verbose=False, input_names=["x"],
        output_names=["y"], dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    return path


def static_file(place: Place, model: nn.Module, path: Path) -> Path:
    """ONNX Runtime's own quantizer, ranges by extrema."""
    path = path.with_suffix(".onnx")
    with tempfile.TemporaryDirectory() as folder:
        whole, made = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        plain_float_file(place, model, whole)
        write_theirs(whole, [images for images, _ in place.batches], made, reduce_range=REDUCED)
        shutil.move(made, path)
    return path
