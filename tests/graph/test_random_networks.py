# SPDX-License-Identifier: Apache-2.0
"""Random networks and transformers are pruned at random, and proved equal to their silenced twins.

FXSLIM_RANDOM_NETWORKS=50000 pytest tests/graph/test_random_networks.py tries more than the 1,000 of every run.
"""

import os

import torch

from fxslim import PlanError, plan_pruning
from fxslim.pruning.verification import TOLERANCE
from tests.graph.random_networks import RandomNetwork
from tests.graph.random_transformers import RandomTransformer

COUNT = int(os.environ.get("FXSLIM_RANDOM_NETWORKS", "1000"))


def test_random_networks_equal_their_twins() -> None:
    reached = 0
    for seed in range(COUNT):
        # Transformers take three times as long.
        model, x = (RandomNetwork, RandomNetwork, RandomTransformer)[seed % 3](seed), torch.randn(2, 3, 8, 8)
        try:
            plan = plan_pruning(model, x, ratio=0.35, importance="random", seed=seed)
        except PlanError:
            continue
        # Asked for a little more than 30 %, since the step nearest to a target may stop short of it.
        reached += plan.macs[1] <= 0.7 * plan.macs[0]
        proof = plan.verify(model, [x, model.other_input()])
        assert proof.relative <= TOLERANCE, f"seed {seed}: {proof}"
        plan.apply(model).train()
        model(x).sum().backward()
    assert reached >= 0.8 * COUNT
