# SPDX-License-Identifier: Apache-2.0
"""Sparsity that stays: which weights of a layer go, and what becomes of the others."""
