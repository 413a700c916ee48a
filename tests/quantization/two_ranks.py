# SPDX-License-Identifier: Apache-2.0
"""One rank of two that train quantized models together; run by test_two_ranks.py, which reads what it writes."""

import datetime
import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fxslim
from fxslim.nn import ActivationQuant, QuantConfig, WeightQuant
from tests.quantization.small_networks import NETWORKS, batch

STEPS = 20
CASES = {
    "convolutions ulq": QuantConfig(activation=ActivationQuant(batch_num=3)),
    "convolutions min_max": QuantConfig(activation=ActivationQuant(method="min_max", averaging=0.1)),
    "convolutions learned": QuantConfig(weight=WeightQuant(method="lsq"), activation=ActivationQuant(method="lsq")),
    "convolutions later": QuantConfig(start_step=4),
    "vit ulq": QuantConfig(activation=ActivationQuant(batch_num=2)),
    "swin ulq": QuantConfig(activation=ActivationQuant(batch_num=2)),
}


def train(rank: int, case: str, calibrated: bool) -> list[dict[str, torch.Tensor]]:
    """The states after each step; ranks see batches of their own."""
    torch.manual_seed(0)
    model = NETWORKS[case.split()[0]]()
    fxslim.prepare_qat(model, CASES[case], example_inputs=torch.zeros(2, 3, 16, 16)).train()
    torch.manual_seed(1 + rank)
    if calibrated:
        with fxslim.calibrating(model), torch.no_grad():
            for _ in range(3):
                model(batch()[0] * (1 + rank))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    states = []
    for _ in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x * (1 + rank)), y).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def main() -> None:
    """Arguments: rank, the file where ranks meet, the file to write."""
    rank, meeting, written = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120)
    )
    found = {case: train(rank, case, False) for case in CASES}
    found["convolutions ulq, calibrated"] = train(rank, "convolutions ulq", True)
    torch.save(found, written)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
