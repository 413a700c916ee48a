# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; run by ``make sanitize``."""

import os
import subprocess
import sys
from pathlib import Path

BUILD = Path("build/sanitize")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
# Every instruction set has code of its own.
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512vnni")


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    build = {**os.environ, "FXSLIM_EXT": "cpu", "FXSLIM_EXT_FLAGS": FLAGS}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "-b", str(BUILD)], env=build, check=True)
    for level in INSTRUCTION_SETS:
        test = {
            **os.environ,
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            # Python and torch never free what lives as long as the process.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "FXSLIM_EXT_DIR": str((BUILD / "fxslim_ext").absolute()),
            "FXSLIM_KERNELS": "native",
            "FXSLIM_CPU": level,
        }
        tests = [
            "tests/kernels/test_operators.py",
            "tests/kernels/test_gradients.py",
            "tests/kernels/test_arguments.py",
            "tests/kernels/test_block_sparse.py",
            "tests/kernels/test_block_sparse_callers.py::test_damaged_places_and_starts_are_not_read",
        ]
        result = subprocess.run([sys.executable, "-m", "pytest", *tests, "-q", "-x"], env=test)
        if result.returncode != 0:
            return result.returncode
        print(f"clean under the sanitizers: {level}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
