# SPDX-License-Identifier: Apache-2.0
"""The channel graph: recording, labels, groups, cost; surgery is the only code that edits modules."""
