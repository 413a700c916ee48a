# SPDX-License-Identifier: Apache-2.0
"""Channel pruning: which channels go, the plan that says so, and the proof that the model is the model."""
