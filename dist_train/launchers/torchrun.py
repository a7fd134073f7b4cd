"""torchrun: one command a node. It keeps an agent on each, which starts the ranks, restarts them, and gathers their output."""

from __future__ import annotations

from dist_train.cluster.ports import candidates, ephemeral_range
from dist_train.launchers.job import Command, Job, environment


def command(job: Job) -> Command:
    """The command for this node: for one node a standalone one, for several those meet at `job.endpoint` (c10d)."""
    words = [job.python, "-m", "torch.distributed.run", *agent_options(job), *meeting_options(job)]
    environ = {}
    if job.nodes[1] > 1:
        # torch 2.14's agents tell nobody anew where their store is: a node that comes back would wait for that, and all with it
        # (elastic/rendezvous/dynamic_rendezvous.py, next_rendezvous; of the kind of pytorch#135712). So rank 0 keeps the ranks' store.
        environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if job.interface:
        # gloo takes the address that this machine's name resolves to, which is not local_addr where that had to be given.
        environ["GLOO_SOCKET_IFNAME"] = job.interface
    return Command((*words, "-m", "dist_train", "run", *job.arguments), environment(job, **environ))


def agent_options(job: Job) -> list[str]:
    """What each node's agent does: ranks, restarts, and the ranks' output to files, that of the first to the terminal too."""
    return [
        *("--nproc-per-node", str(job.nproc_per_node)),
        *("--max-restarts", str(job.restarts)),
        *("--shutdown-timeout", str(job.shutdown_timeout)),
        *("--log-dir", job.logs),
        *("--tee", "3"),
        *("--local-ranks-filter", "0"),
    ]


def meeting_options(job: Job) -> list[str]:
    """How the nodes find each other."""
    least, most = job.nodes
    if most == 1:
        return ["--standalone"]
    words = [
        *("--nnodes", str(least) if least == most else f"{least}:{most}"),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{job.endpoint}:{port(job)}"),
        *("--rdzv-id", job.rdzv_id),
    ]
    if job.is_host is not None:
        words += ["--rdzv-conf", f"is_host={str(job.is_host).lower()}"]
    if job.local_addr:
        words += ["--local-addr", job.local_addr]
    return words


def port(job: Job) -> int:
    """The port of the endpoint: as given, or from the id, which is the same on all nodes."""
    return job.port or next(candidates(job.rdzv_id, ephemeral_range()))
