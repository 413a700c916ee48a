# SPDX-License-Identifier: Apache-2.0
"""Out of training: files for runtimes."""
