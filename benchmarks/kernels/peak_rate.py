# SPDX-License-Identifier: Apache-2.0
"""The multiply-adds that one core can make in a second, measured: vectors of float32 that never leave registers."""

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

_SOURCE = """
typedef float vector __attribute__((vector_size({bytes}), aligned(4)));
float run(long rounds, const float *from) {{
  vector sums[12], x, y;
  for (int i = 0; i < 12; ++i) sums[i] = *(const vector *)(from + i);
  x = *(const vector *)(from + 16), y = *(const vector *)(from + 32);
  for (long r = 0; r < rounds; ++r) {{
{steps}
    __asm__ volatile("" : "+x"(x), "+x"(y));
  }}
  float total = 0;
  for (int i = 0; i < 12; ++i) for (int k = 0; k < {bytes} / 4; ++k) total += sums[i][k];
  return total;
}}
"""
_ROUNDS = 4_000_000


def _widest() -> int:
    """Bytes of the widest vectors that this processor has."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return 64 if "avx512f" in flags else 32 if "avx2" in flags else 16


def peak_gflops() -> float:
    """The best of several runs of a loop of 12 independent sums, in 10^9 operations a second; needs a C compiler."""
    width = _widest()
    steps = "\n".join(f"    sums[{i}] = sums[{i}] * x + y;" for i in range(12))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(_SOURCE.format(bytes=width, steps=steps))
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
        run.argtypes, run.restype = (ctypes.c_long, ctypes.c_void_p), ctypes.c_float
        numbers = (ctypes.c_float * 64)(*[0.5] * 64)
        best = 0.0
        for _ in range(20):
            start = time.process_time()
            run(_ROUNDS, ctypes.addressof(numbers))
            best = max(best, _ROUNDS * 12 * (width // 4) * 2 / (time.process_time() - start) / 1e9)
    return best
