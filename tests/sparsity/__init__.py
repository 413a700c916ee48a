# SPDX-License-Identifier: Apache-2.0
"""Tests of fxslim.sparsity."""
