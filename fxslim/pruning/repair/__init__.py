# SPDX-License-Identifier: Apache-2.0
"""Repair without training: what a removal breaks is mended from data, weights by least squares, norms by averages."""
