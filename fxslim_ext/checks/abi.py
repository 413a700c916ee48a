# SPDX-License-Identifier: Apache-2.0
"""One binary for every torch: build against the oldest, test on it and on the newest, read the symbols.

Run by ``make abi``. The environment of the oldest torch is made in .venv-abi (about 5 GB), or is the one
that FXSLIM_ABI_PYTHON names.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

OLDEST = ["torch==2.11.*", "torchvision==0.26.*"]
TOOLS = ["numpy", "safetensors", "tqdm", "pytest", "pytest-randomly", "hypothesis", "setuptools>=77"]
BUILD = Path("build/abi")
FOREIGN = ("at::", "c10::", "torch::autograd", "torch::jit", "caffe2::")


def run(*command: object, **environment: str) -> str:
    print("$", *command, flush=True)
    result = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\nfailed with {result.returncode}")
    return result.stdout


def oldest_python() -> Path:
    if named := os.environ.get("FXSLIM_ABI_PYTHON"):
        return Path(named)
    python = Path(".venv-abi/bin/python").absolute()
    if not python.exists():
        venv.create(".venv-abi", with_pip=True)
        index = os.environ.get("FXSLIM_TORCH_INDEX")
        run(python, "-m", "pip", "install", "-q", *(["--index-url", index] if index else []), *OLDEST)
        run(python, "-m", "pip", "install", "-q", *TOOLS)
    return python


def check_symbols(library: Path) -> None:
    lines = run("nm", "-D", "-C", "--undefined-only", library).splitlines()
    names = [line.split(" U ", 1)[-1].strip() for line in lines]
    foreign = [name for name in names if any(part in name for part in FOREIGN)]
    if foreign:
        sys.exit(f"{library} needs symbols outside the stable ABI: {foreign[:10]}")
    stable = sum(name.startswith(("aoti_torch_", "torch_")) for name in names)
    print(f"{library.name}: {len(names)} undefined symbols, {stable} of torch's stable ABI, none of at:: or c10::")


def main() -> None:
    oldest = oldest_python()
    run(oldest, "setup.py", "-q", "build_ext", "-b", BUILD)
    libraries = sorted((BUILD / "fxslim_ext").glob("*.so"))
    for library in libraries:
        check_symbols(library)
    # What is built against the newest torch must load on the oldest too.
    code = "import torch, pathlib; [torch.ops.load_library(p) for p in pathlib.Path('fxslim_ext').glob('*.so')]"
    run(oldest, "-c", code)
    for python in (oldest, Path(sys.executable)):
        version = run(python, "-c", "import torch; print(torch.__version__)").strip()
        environment = {"FXSLIM_EXT_DIR": str((BUILD / "fxslim_ext").absolute()), "FXSLIM_KERNELS": "native"}
        output = run(python, "-m", "pytest", "tests/kernels", "-q", "-q", "-rf", **environment)
        print(f"operator tests pass on torch {version}\n{output}")


if __name__ == "__main__":
    main()
