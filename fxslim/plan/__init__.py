# SPDX-License-Identifier: Apache-2.0
"""What all plans share: how indices are written, what they are bound to, which were applied."""
