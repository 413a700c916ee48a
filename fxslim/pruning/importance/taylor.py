# SPDX-License-Identifier: Apache-2.0
"""First order Taylor: how much the loss would change if the weights of a channel were 0."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fxslim.graph.slots import Slot, entry_sums
from fxslim.pruning.importance.criterion import Context, check_choice
from fxslim.pruning.importance.gradients import GradientImportance


@dataclass(frozen=True, kw_only=True)
class Taylor(GradientImportance):
    """The mean over samples of a form of weight times gradient, over the slice of the channel in each weight.

    "absolute" is |sum w g|, the change of the loss; "squared" is sum (w g)^2, as NNI's documentation has it;
    "gate" is (sum w g)^2, the squared gradient of a factor before the channel.
    """

    name: ClassVar[str] = "taylor"
    form: str = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "form", self.form, ("absolute", "squared", "gate"))

    def of_sample(self, product: Tensor, slot: Slot, context: Context) -> np.ndarray:
        """Summed over all entries of a class before the magnitude is taken."""
        terms = product.square() if self.form == "squared" else product
        sums = context.holding(slot).sums(entry_sums(terms, slot).cpu().numpy())
        return np.square(sums) if self.form == "gate" else np.abs(sums)
