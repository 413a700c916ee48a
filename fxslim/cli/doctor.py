# SPDX-License-Identifier: Apache-2.0
"""``fxslim doctor``: what is installed, what the machine has, and which kernel runs where."""

import importlib.metadata
import os
import platform

import torch

from fxslim.kernels import implementation, operator_names
from fxslim.version import __version__

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "tensorboard",
    "onnx",
    "onnxruntime",
    "optuna",
    "matplotlib",
)
_ENVIRONMENT = ("FXSLIM_KERNELS", "FXSLIM_EXT_DIR", "FXSLIM_CPU", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda_line() -> str:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch has CUDA {torch.version.cuda}, no device found"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch has CUDA {torch.version.cuda}; {', '.join(names)}"


def doctor_report() -> str:
    """The whole report as text.

    >>> "fake_quantize" in doctor_report()
    True
    """
    lines = [f"fxslim {__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += [f"  {name:14} {_package_version(name)}" for name in _PACKAGES]
    lines += ["", f"  CPU            {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    lines += [f"  CUDA           {_cuda_line()}"]
    lines += [f"  {name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    reasons: list[str] = []
    lines += ["", f"  {'kernel':34} {'cpu':11} cuda"]
    for name in operator_names():
        kinds = []
        for device in ("cpu", "cuda"):
            kind, reason = implementation(name, device)
            kinds.append(kind)
            if reason and (line := f"  {device} reference: {reason}") not in reasons:
                reasons.append(line)
        lines.append(f"  {name:34} {kinds[0]:11} {kinds[1]}")
    return "\n".join([*lines, *([""] if reasons else []), *reasons])
