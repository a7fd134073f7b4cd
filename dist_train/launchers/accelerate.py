"""accelerate launch: the command, and a config file with which it starts more than one process.

On CPUs it starts several processes only through torchrun, and uses torchrun only for `distributed_type: MULTI_GPU`.
`MULTI_CPU` without mpirun starts one process, and so does `--cpu --num_processes 2` (accelerate 1.15,
commands/launch.py and utils/launch.py).
"""

from __future__ import annotations

from dist_train.cluster.ports import candidates, ephemeral_range
from dist_train.cluster.rank_plan import ASKED
from dist_train.launchers.job import Command, Job, environment
from dist_train.launchers.torchrun import bracketed


def command(job: Job) -> Command:
    """Returns the command for this node, with a config file where the user gives none."""
    file = job.config_file or f"{job.logs}/accelerate.yaml"
    words = [
        *(job.python, "-m", "accelerate.commands.launch", "--config_file", file),
        *("--max_restarts", str(job.restarts)),
        *("--log_dir", job.logs, "--tee", "3"),
    ]
    if job.nodes[1] > 1:
        # For the rendezvous of our config file accelerate joins address and port by a colon.
        endpoint = job.endpoint if job.config_file else bracketed(job.endpoint)
        words += ["--machine_rank", str(job.node_rank), "--main_process_ip", endpoint]
    words += ["--main_process_port", str(port(job))]
    # PET_*: torchrun's own variables, as accelerate has no options for these.
    environ = environment(job, PET_LOCAL_RANKS_FILTER="0", PET_SHUTDOWN_TIMEOUT=str(job.shutdown_timeout))
    if job.config_file and processes(job) == 1:
        del environ[ASKED]  # the user's file says how many
    elif job.config_file:
        words += ["--num_processes", str(processes(job))]
    files = {} if job.config_file else {file: config_file(job)}
    return Command((*words, "-m", "dist_train", "run", *job.arguments), environ, files)


def config_file(job: Job) -> str:
    """Returns accelerate's config file for the job as YAML: the same on all its nodes."""
    nodes = job.nodes[1]
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU" if processes(job) > 1 else "'NO'",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "'no'",  # the configuration's `precision` decides
        "num_machines": nodes,
        "num_processes": processes(job),
        "rdzv_backend": "static" if nodes == 1 else "c10d",
        "same_network": "true",
        "use_cpu": str(job.gpus_per_process == 0).lower(),
    }
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


def processes(job: Job) -> int:
    return job.nodes[1] * job.nproc_per_node


def port(job: Job) -> int:
    """Returns the given port; else 0 on one node, for a free one; else one derived from the id, equal on all nodes."""
    if job.port is not None or job.nodes[1] == 1:
        return job.port or 0
    return next(candidates(job.rdzv_id, ephemeral_range()))
