# SPDX-License-Identifier: Apache-2.0
"""Accuracy, latency and size of every combination on one task, and of other tools' recipes beside them."""
