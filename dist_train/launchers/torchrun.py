"""torchrun: one command on each node, whose agent starts the ranks, restarts them, and gathers their output."""

from __future__ import annotations

from dist_train.cluster.ports import candidates, ephemeral_range
from dist_train.launchers.job import Command, Job, environment


def command(job: Job) -> Command:
    """Returns the command for this node: standalone for one node, else with a c10d rendezvous at `job.endpoint`."""
    words = [job.python, "-m", "torch.distributed.run", *agent_options(job), *meeting_options(job)]
    environ = {}
    if job.nodes[1] > 1:
        # Agents of torch 2.14 publish the address of the shared store only once: a node that comes back would wait for
        # it, and all others with that node (dynamic_rendezvous.py, next_rendezvous; like pytorch#135712).
        # So rank 0 keeps the ranks' store.
        environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if job.interface:
        # gloo would listen at the address of the host name, which differs from local_addr where that is given.
        environ["GLOO_SOCKET_IFNAME"] = job.interface
    return Command((*words, "-m", "dist_train", "run", *job.arguments), environment(job, **environ))


def agent_options(job: Job) -> list[str]:
    """Returns the options of each node's agent: ranks, restarts, log files, and rank 0's output to the terminal."""
    return [
        *("--nproc-per-node", str(job.nproc_per_node)),
        *("--max-restarts", str(job.restarts)),
        *("--shutdown-timeout", str(job.shutdown_timeout)),
        *("--log-dir", job.logs),
        *("--tee", "3"),
        *("--local-ranks-filter", "0"),
    ]


def meeting_options(job: Job) -> list[str]:
    """Returns the options by which the nodes find each other."""
    least, most = job.nodes
    local = ["--local-addr", job.local_addr] if job.local_addr else []
    if most == 1:
        return ["--standalone", *local]
    words = [
        *("--nnodes", str(least) if least == most else f"{least}:{most}"),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"{bracketed(job.endpoint)}:{port(job)}"),
        *("--rdzv-id", job.rdzv_id),
    ]
    if job.is_host is not None:
        words += ["--rdzv-conf", f"is_host={str(job.is_host).lower()}"]
    return words + local


def bracketed(host: str) -> str:
    """Returns the host as it stands before `:port`: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def port(job: Job) -> int:
    """Returns the port of the endpoint: as given, or derived from the id, which is the same on all nodes."""
    return job.port or next(candidates(job.rdzv_id, ephemeral_range()))
