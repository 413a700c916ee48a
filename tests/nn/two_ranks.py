# SPDX-License-Identifier: Apache-2.0
"""One rank of two that train masked layers together; run by test_two_ranks.py, which reads what it writes."""

import datetime
import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fxslim.nn import MaskedConv2d, MaskedLinear


def build(regrow: float, gradient: str) -> nn.Sequential:
    """A network that changes its masks at every batch."""
    torch.manual_seed(0)
    settings = {"update_freq": 1, "regrow": regrow, "gradient": gradient}
    return nn.Sequential(
        MaskedConv2d(4, 8, 3, pattern="2:4", **settings), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        MaskedLinear(32, 4, pattern="2:4", **settings),
    )  # fmt: skip


def train(rank: int, regrow: float, gradient: str, forwards: int) -> list[dict[str, torch.Tensor]]:
    """The states after each of 5 steps; ranks see batches of their own, and make so many forwards a step."""
    model = DistributedDataParallel(build(regrow, gradient))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    torch.manual_seed(1 + rank)
    states = []
    for _ in range(5):
        optimizer.zero_grad()
        outputs = [model(torch.randn(3, 4, 4, 4)) for _ in range(forwards)]
        sum(y.pow(2).mean() for y in outputs).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.module.state_dict().items()})
    return states


def main() -> None:
    """Arguments: rank, the file where ranks meet, the file to write."""
    rank, meeting, written = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    found = {
        f"{regrow} {gradient}": train(rank, regrow, gradient, 1)
        for regrow in (0.0, 2.0)
        for gradient in ("zero", "sr_ste")
    }
    found["two forwards"] = train(rank, 0.0, "sr_ste", 2)
    torch.save(found, written)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
