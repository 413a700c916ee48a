# SPDX-License-Identifier: Apache-2.0
"""Reads plans of any kind from files."""

import json
from pathlib import Path
from typing import Any

from fxslim.deploy.convert_plan import ConvertPlan
from fxslim.errors import CheckpointError, unknown_name
from fxslim.plan.plan import Plan
from fxslim.pruning.pruning_plan import PruningPlan
from fxslim.quantization.quantization_plan import QuantizationPlan
from fxslim.sparsity.baking import BakePlan
from fxslim.sparsity.sparsity_plan import SparsityPlan

_KINDS: dict[str, type[Plan]] = {
    plan.kind: plan for plan in (PruningPlan, SparsityPlan, BakePlan, QuantizationPlan, ConvertPlan)
}


def plan_from_dict(data: Any) -> Plan:
    """The plan that a plan's ``to_dict`` wrote."""
    if not isinstance(data, dict) or "kind" not in data:
        raise CheckpointError("this is no plan of fxslim: it has no 'kind'")
    kind = str(data["kind"])
    if kind not in _KINDS:
        raise CheckpointError(unknown_name("kind of plan", kind, _KINDS))
    return _KINDS[kind].from_dict(data)


def load_plan(path: str | Path) -> Plan:
    """The plan that ``plan.save(path)`` wrote."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as a plan: {type(error).__name__}: {error}") from error
    try:
        return plan_from_dict(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
