# SPDX-License-Identifier: Apache-2.0
"""Tests of repair without training."""
