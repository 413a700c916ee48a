# SPDX-License-Identifier: Apache-2.0
"""Attaches the compiled kernels, where there are any; the only module that knows fxslim_ext.

The libraries implement the CPU and CUDA keys of operators whose schema and reference are defined
in Python. The dispatcher is the fallback: what is not attached runs the reference.
"""

import importlib.util
import logging
import os
from pathlib import Path

import torch

from fxslim.errors import ConfigError, unknown_name

logger = logging.getLogger(__name__)

_CHOICES = ("auto", "native", "reference")
_INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vnni")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_reasons: dict[str, str] = {}


def _library_folder() -> Path | None:
    """Where the libraries lie: FXSLIM_EXT_DIR, else the installed fxslim_ext package."""
    if folder := os.environ.get("FXSLIM_EXT_DIR"):
        return Path(folder)
    spec = importlib.util.find_spec("fxslim_ext")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _attach_one(device: str, folder: Path | None) -> str:
    """Load one library; returns '' when it is attached, else why not."""
    if device == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    if folder is None:
        return "fxslim_ext is not installed"
    path = folder / f"fxslim_{device}.so"
    if not path.is_file():
        return f"{path} was not built (see 'Building the kernels' in README.md)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = f"{path} does not load: {error.__cause__ or error}"
        logger.warning("%s kernels: reference, because %s", device, reason)
        return reason
    if not any(_is_attached(name, device) for name in operator_names()):
        return f"{path} holds no kernels"
    return ""


def _is_attached(op_name: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fxslim::{op_name}", _KEYS[device])


def attach_libraries() -> None:
    """Load what FXSLIM_KERNELS asks for: auto (default), native (or an error), reference."""
    choice = os.environ.get("FXSLIM_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ConfigError("FXSLIM_KERNELS: " + unknown_name("choice", choice, _CHOICES))
    instruction_set = os.environ.get("FXSLIM_CPU", "avx512vnni")
    if instruction_set not in _INSTRUCTION_SETS:
        raise ConfigError("FXSLIM_CPU: " + unknown_name("instruction set", instruction_set, _INSTRUCTION_SETS))
    folder = _library_folder() if choice != "reference" else None
    for device in ("cpu", "cuda"):
        forced = "FXSLIM_KERNELS=reference" if choice == "reference" else ""
        _reasons[device] = forced or _attach_one(device, folder)
    if choice == "native" and _reasons["cpu"]:
        raise ConfigError(f"FXSLIM_KERNELS=native, but {_reasons['cpu']}")
    if _reasons["cpu"]:
        logger.info("CPU kernels: reference (%s)", _reasons["cpu"])


def operator_names() -> list[str]:
    """All operators of fxslim, each with a reference; any of them may be native."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("fxslim::").split(".")[0] for name in names if name.startswith("fxslim::")})


def implementation(op_name: str, device: str) -> tuple[str, str]:
    """('native' or 'reference', why) for an operator on a device type.

    >>> implementation("fake_quantize", "mps")
    ('reference', 'no native kernels for mps')
    """
    if device not in _reasons:
        return "reference", f"no native kernels for {device}"
    if _is_attached(op_name, device):
        return "native", ""
    return "reference", _reasons[device] or f"the {device} library has no {op_name}"
