# SPDX-License-Identifier: Apache-2.0
"""Folder of the compiled kernels, fxslim_cpu.so and fxslim_cuda.so; fxslim.kernels.native loads them."""
