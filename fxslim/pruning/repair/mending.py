# SPDX-License-Identifier: Apache-2.0
"""A plan's repair as ``apply`` runs it: weights before the cut, norms after it."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fxslim.batches import Data
from fxslim.errors import PlanError, UnsupportedLayerError
from fxslim.graph.model_state import HookState
from fxslim.graph.size_checks import NewAttribute
from fxslim.graph.surgery.changes import Changes
from fxslim.graph.surgery.cutting import Cut, Surgery
from fxslim.graph.width_scales import Scaling
from fxslim.pruning.channel_masking import unmasked_copy
from fxslim.pruning.repair.batch_norms import change_statistics, free_norms
from fxslim.pruning.repair.fitted_layers import find_fits
from fxslim.pruning.repair.refitting import refit_in_order, refit_to_original
from fxslim.pruning.repair.settings import BN, LEAST_SQUARES, Repair
from fxslim.pruning.scaling import scaled_values

UNREPAIRED = "compared without the plan's repair, which changes values: the proof is about the cut"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Mending:
    """A repair with the data that it reads."""

    repair: Repair
    data: Data

    @classmethod
    def planned(cls, repair: Repair | None, given: Data | None, known: Data | None) -> "Mending | None":
        """What a plan asks for, by the data given to ``apply``, or else to the plan."""
        if repair is None:
            if given is not None:
                raise PlanError("data= is for a plan with repair, and this plan has none: make it with repair='bn'")
            return None
        data = known if given is None else given
        if data is None:
            raise PlanError(
                f"the plan repairs ({', '.join(repair.steps)}) and has no data, which plans don't keep in files: "
                "give data= when planning or apply(model, data=batches), or apply(model, values=False) and load a state"
            )
        return cls(repair=repair, data=data)

    def weights(
        self,
        model: nn.Module,
        cuts: Sequence[Cut],
        new_sizes: Sequence[NewAttribute],
        scalings: Sequence[Scaling],
        changes: Changes,
    ) -> dict[str, Tensor]:
        """Full-size values of weights and biases that are refitted, in float64; the model stays as it is."""
        if LEAST_SQUARES not in self.repair.steps:
            return {}
        changes.on_undo(HookState(model).restore)
        fits, _ = find_fits(model, cuts, inputs=self.repair.inputs, limit_bytes=self.repair.limit_bytes)
        if self.repair.inputs == "original":
            values, left = refit_to_original(model, fits, self.repair, self.data)
        else:
            pruned = _copied(model)
            Surgery(pruned, cuts, new_sizes=new_sizes, values=scaled_values(model, scalings, {})).commit(Changes())
            values, left = refit_in_order(model, pruned, fits, self.repair, self.data, cuts, scalings)
        for name, reason in left.items():
            _log.warning("repair: %s: %s", name, reason)
        return scaled_values(model, [one for one in scalings if one.name in values], values)

    def mend_norms(self, model: nn.Module, changed: Iterable[Tensor], changes: Changes) -> None:
        """New statistics for the norms of a pruned model that were changed or are behind a change."""
        if BN in self.repair.steps:
            norms = free_norms(model)
            if norms:
                change_statistics(model, norms, self.data, changes, changed)


def repair_notes(model: nn.Module, cuts: Iterable[Cut], repair: Repair) -> Iterator[str]:
    """What a repair will leave as it is."""
    if LEAST_SQUARES in repair.steps:
        _, told = find_fits(model, cuts, inputs=repair.inputs, limit_bytes=repair.limit_bytes)
        yield from (f"repair: {name}: {reason}" for name, reason in told.items())
    if BN in repair.steps:
        free = free_norms(model)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and name not in free:
                yield f"repair: {name}: it is frozen, or keeps no statistics: left as it is"


def _copied(model: nn.Module) -> nn.Module:
    try:
        return unmasked_copy(model)
    except Exception as error:
        raise UnsupportedLayerError(
            f"repair runs a pruned copy beside the model, which can't be copied ({type(error).__name__}: {error}): "
            "give repair=fxslim.Repair(steps=..., inputs='original')"
        ) from error
