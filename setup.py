# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels of fxslim_ext; everything else about the package is in setup.cfg.

FXSLIM_EXT=auto (default) builds for the CPU, and for CUDA where nvcc is found; a build that can't be made
is reported and left out: the reference is used then. cpu and cuda make a failure an error; off builds nothing.
FXSLIM_EXT_FLAGS adds compiler flags.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("fxslim_ext/csrc")
# The libraries use nothing of Python; only its free-threaded build can't say so.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
# The oldest torch that the libraries run on; they use no symbol that is newer.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CPU_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
    " -fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp-simd"
)
# Native code for these, and portable code (PTX) of the last one for whatever comes later.
CUDA_ARCHITECTURES = ("75", "80", "90")


class LibraryError(Exception):
    """A library can't be built here, and why."""


def torch_folder():
    try:
        import torch
    except (ImportError, OSError) as error:
        raise LibraryError(
            f"torch can't be imported at build time ({error}); install it first and pass --no-build-isolation"
        ) from None
    return Path(torch.__file__).parent


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in candidates:
        if nvcc and os.path.isfile(nvcc) and os.access(nvcc, os.X_OK):
            return nvcc
    raise LibraryError("nvcc was not found (CUDA_HOME; without it PATH and /usr/local/cuda)")


def run(command):
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise LibraryError(f"{command[0]} can't be run: {error}") from None
    sys.stderr.write(result.stderr)
    if result.returncode != 0:
        raise LibraryError(f"{command[0]} failed:\n{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def supported_architectures(nvcc):
    listed = run([nvcc, "--list-gpu-code"]).split()
    architectures = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed]
    if not architectures:
        raise LibraryError(f"{nvcc} compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    return architectures


def check_cuda_version(nvcc):
    """A newer CUDA than torch's may ask for a newer driver than torch does."""
    import torch

    found = re.search(r"release (\d+)", run([nvcc, "--version"]))
    if found and torch.version.cuda and int(found[1]) > int(torch.version.cuda.split(".")[0]):
        raise LibraryError(f"{nvcc} is of CUDA {found[1]}, torch of {torch.version.cuda}")


def compile_library(target, sources, compiler, link, libraries):
    """Compile each source on its own, two at a time, and link them."""
    if not sources:
        raise LibraryError(f"no sources for {target.name} under {SOURCES}")
    folder = Path("build/objects", *target.with_suffix("").parts[target.is_absolute() :])
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / (source.stem + ".o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(
            pool.map(
                lambda pair: run([*compiler, "-c", str(pair[0]), "-o", str(pair[1])]),
                zip(sources, objects, strict=True),
            )
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*link, "-shared", *map(str, objects), "-o", str(target), f"-L{torch_folder() / 'lib'}", *libraries])


def build_cpu(target):
    cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if cxx is None:
        raise LibraryError("no C++ compiler was found (CXX, c++, g++)")
    cxx = shlex.split(cxx)
    extra = shlex.split(os.environ.get("FXSLIM_EXT_FLAGS", ""))
    include = ["-isystem", str(torch_folder() / "include")]
    flags = [*shlex.split(CPU_FLAGS), STABLE_ABI, *include, *extra]
    compile_library(target, sorted((SOURCES / "cpu").glob("*.cpp")), [*cxx, *flags], [*cxx, *extra], ["-ltorch_cpu"])


def build_cuda(target):
    nvcc = find_nvcc()
    check_cuda_version(nvcc)
    architectures = supported_architectures(nvcc)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    flags = [
        *["-std=c++20", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"],
        *[STABLE_ABI, "-DUSE_CUDA", "-isystem", str(torch_folder() / "include")],
    ]
    torch_cuda = ["-ltorch_cuda"] if (torch_folder() / "lib/libtorch_cuda.so").exists() else []
    sources = sorted((SOURCES / "cuda").glob("*.cu"))
    compile_library(target, sources, [nvcc, *flags, *codes], [nvcc, "-cudart", "static"], ["-ltorch_cpu", *torch_cuda])


class BuildKernels(build_ext):
    """One library per device, so that a torch without CUDA can load the CPU's."""

    def run(self):
        choice = os.environ.get("FXSLIM_EXT", "auto")
        if choice not in ("auto", "cpu", "cuda", "off"):
            raise SystemExit(f"FXSLIM_EXT={choice!r} must be auto, cpu, cuda or off")
        folder = Path("fxslim_ext") if self.inplace else Path(self.build_lib) / "fxslim_ext"
        for device, build in (("cpu", build_cpu), ("cuda", build_cuda)):
            target = folder / f"fxslim_{device}.so"
            if choice == "off" or (choice == "cpu" and device == "cuda"):
                target.unlink(missing_ok=True)
                self.say(f"{device}: not built (FXSLIM_EXT={choice})")
                continue
            try:
                build(target)
                self.say(f"{device}: built {target}")
            except LibraryError as error:
                if choice in (device, "cuda"):
                    raise SystemExit(f"fxslim kernels for {device}: {error}") from None
                target.unlink(missing_ok=True)
                self.say(f"{device}: not built, the reference in Python is used: {error}")

    @staticmethod
    def say(text):
        print(f"fxslim kernels for {text}", file=sys.stderr)

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "fxslim_ext").glob("fxslim_*.so")]


setup(
    ext_modules=[Extension("fxslim_ext.kernels", sources=[], py_limited_api=not FREE_THREADED)],
    cmdclass={"build_ext": BuildKernels},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
