# SPDX-License-Identifier: Apache-2.0
"""Any order, the same for the same seed: what another criterion has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fxslim.errors import ConfigError
from fxslim.pruning.importance.criterion import Context, Importance


@dataclass(frozen=True, kw_only=True)
class Random(Importance):
    """A random number for each channel, from the seed of the plan."""

    name: ClassVar[str] = "random"

    def scores(self, context: Context) -> np.ndarray:
        """Uniform numbers."""
        seed = context.seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed={seed!r} must be an integer of at least 0")
        return np.random.default_rng(seed).random(len(context.graph.resolved.classes))
