"""A replica group of one rank under torchft's Manager, started by `python -m`: NAME PORT STEPS LEAVE_AT HOLD_AT.

Each step, the sampler is sliced by the ranks that take part in it, so the global batch stays what it was. Prints a line
for each step, and writes its weights to NAME.pt. It dies before step LEAVE_AT, if that is not 0, and waits before step
HOLD_AT for a file `go`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo

from dist_train import ElasticDistributedSampler

ROWS, BATCH = 203, 20


def main() -> None:
    name, (port, steps, leave_at, hold_at) = sys.argv[1], map(int, sys.argv[2:])
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    torch.manual_seed(0)
    data = torch.randn(ROWS, 8)
    target = data[:, :1] * 2 + 1
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=20)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        use_async_quorum=False,  # a step's rows follow from its ranks, so these are known before it
        init_sync=False,
        replica_id=name,
        store_addr="127.0.0.1",
        store_port=store.port,
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
        quorum_timeout=timedelta(seconds=60),
    )
    Path(f"{name}.ready").touch()
    while (step := manager.current_step()) < steps:
        if leave_at and step >= leave_at:
            os._exit(9)
        while step == hold_at and not Path("go").exists():
            time.sleep(0.02)
        optimizer.zero_grad()
        manager.start_quorum()
        step, ranks, rank = manager.current_step(), manager.num_participants(), manager.participating_rank()
        sampler = ElasticDistributedSampler(range(ROWS), ranks, rank, global_batch_size=BATCH)
        epoch, within = divmod(step, sampler.num_steps)
        sampler.set_epoch(epoch)
        part = sampler.rank_slice(within)
        ids = part.ids.tolist()
        # The manager takes the mean over the ranks, and the loss is the mean over the global batch.
        loss = ((model(data[ids]) - target[ids]) ** 2).sum() * ranks / part.global_count
        loss.backward()
        for parameter in model.parameters():
            manager.allreduce(parameter.grad).wait()
        if manager.should_commit():
            optimizer.step()
            print(json.dumps({"step": step, "ranks": ranks, "ids": ids}), flush=True)
    torch.save([parameter.detach() for parameter in model.parameters()], f"{name}.pt")
    sys.stdin.read()  # others may still need its answers
    os._exit(0)


if __name__ == "__main__":
    main()
