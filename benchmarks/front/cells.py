# SPDX-License-Identifier: Apache-2.0
"""Every combination on the front: what is trained, and the files that are made of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.front import compressed_models as ours
from benchmarks.front import peer_models as peers
from benchmarks.front.places import Place

Write = Callable[[Place, nn.Module, Path], Path]
FLOAT, TRAINED_ON = "float", "float, trained on"
PRUNED = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A file, who makes it, and how it is written of the trained model."""

    name: str
    by: str
    write: Write


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the fixed budget (none without ``trains``), and the rows of the table that are made of it.

    ``lighter``: with fewer macs than the network, which buy more steps.
    """

    name: str
    prepare: Callable[[Place], nn.Module]
    rows: tuple[Row, ...]
    trains: bool = True
    lighter: bool = False


def _ours(name: str, prepare: Callable[[Place], nn.Module], *, lighter: bool = False, **writes: Write) -> Cell:
    """A row for each keyword: "plain" is named like the cell."""
    return _cell(name, "fxslim", prepare, {_SUFFIXES[key]: write for key, write in writes.items()}, lighter)


def _cell(
    name: str, by: str, prepare: Callable[[Place], nn.Module], writes: dict[str, Write], lighter: bool = False
) -> Cell:
    rows = tuple(Row(name=name + suffix, by=by, write=write) for suffix, write in writes.items())
    return Cell(name=name, prepare=prepare, rows=rows, lighter=lighter)


_SUFFIXES = {"plain": "", "int8": ", int8"}
_THEIRS: dict[str, Write] = {"": peers.plain_float_file, ", quantize_static": peers.static_file}
_FLOAT_ROWS = (
    Row(name=FLOAT, by="fxslim", write=ours.float_file),
    Row(name="int8, calibrated", by="fxslim", write=ours.calibrated_file),
    Row(name="float, quantize_static", by="ONNX Runtime", write=peers.static_file),
)
CELLS = (
    Cell(name=FLOAT, prepare=ours.unchanged, rows=_FLOAT_ROWS, trains=False),
    _ours(TRAINED_ON, ours.unchanged, plain=ours.float_file),
    _ours("int8, trained", ours.quantized, plain=ours.trained_grid_file),
    *(
        _ours(
            f"pruned {100 * ratio:.0f} %", partial(ours.pruned, ratio=ratio), lighter=True,
            plain=ours.float_file, int8=ours.calibrated_file,
        )
        for ratio in PRUNED
    ),
    _ours("2:4", partial(ours.sparse, pattern="2:4", ratio=0.5), int8=ours.calibrated_file),
    *(
        _ours(
            f"Cin32Cout64 {100 * ratio:.0f} %", partial(ours.sparse, pattern="cin32cout64", ratio=ratio),
            plain=ours.block_sparse_file, int8=ours.int8_block_sparse_file,
        )
        for ratio in (0.5, 0.75)
    ),
    *(
        _cell(
            f"Torch-Pruning {100 * ratio:.0f} %", "Torch-Pruning", partial(peers.torch_pruning, ratio=ratio), _THEIRS,
            lighter=True,
        )
        for ratio in PRUNED
    ),
    _cell("torch.ao QAT", "torch.ao", peers.torch_ao, {"": peers.torch_ao_file}),
    *(
        _cell(f"plain magnitude {100 * ratio:.0f} %", "torch", partial(peers.plain_magnitude, ratio=ratio), _THEIRS)
        for ratio in (0.5, 0.75)
    ),
)  # fmt: skip
ROWS = tuple(row for cell in CELLS for row in cell.rows)
