# SPDX-License-Identifier: Apache-2.0
"""The version, read by setup.cfg without importing torch."""

__version__ = "0.1.0"
