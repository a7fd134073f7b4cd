"""Slurm: the batch script. It starts a torchrun on each node, or a task for each rank, stops them, and requeues itself.

Observed on Slurm 22.05: bash runs a trap only when it does not wait for a foreground child, so srun runs in the
background. A script that returns is not requeued, so it requeues itself. srun ignores sbatch's --cpus-per-task.
Tasks of an array are requeued one by one only by ARRAY_TASK names.
"""

from __future__ import annotations

import re
import shlex

from dist_train.addresses import is_address
from dist_train.launchers.job import Job
from dist_train.launchers.torchrun import agent_options


def script(job: Job) -> str:
    """Returns the batch script for `sbatch`."""
    head = "".join(
        f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "") + "\n" for name, value in options(job).items()
    )
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in job.environment)
    at_store = is_address(job.run_dir)
    settings = {
        "python": shlex.quote(job.python),
        "arguments": f"({shlex.join(job.arguments)})",
        "run_dir": shlex.quote(job.home if at_store else job.run_dir),
        "suffix": "" if at_store or job.home == job.run_dir else shlex.quote("-fast-dev-run"),
        "max_requeues": str(job.requeues),
        "port": str(job.port or ""),
    }
    assignments = "".join(f"{name}={value}\n" for name, value in settings.items())
    return "".join(
        [
            "#!/bin/bash\n",
            head,
            "# Made by: " + job.made_by.replace("\n", "\n# ") + "\n" if job.made_by else "",
            _YOURS,
            exports,
            _SETTINGS,
            assignments,
            _NO_ARRAY if at_store else "",
            _BEFORE,
            _step(job),
            _AFTER,
        ]
    )


def options(job: Job) -> dict[str, str]:
    """Returns sbatch's options in order: ours, replaced and followed by the user's.

    A flag has the value "". An option that is "" or false is left out.
    """
    least, most = job.nodes
    tasks = job.nproc_per_node if job.task_per_rank else 1
    cpus = job.cpus_per_process * job.nproc_per_node // tasks
    ours = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "nodes": str(least) if least == most else f"{least}-{most}",
        "ntasks-per-node": str(tasks),
        "cpus-per-task": str(cpus),
        "gpus-per-node": str(job.gpus_per_process * job.nproc_per_node or ""),
        "signal": f"B:USR2@{job.stop_before}",
        "requeue": "true",
        "open-mode": "append",
    }
    merged = ours | dict(sorted(job.sbatch))
    return {name: "" if value == "true" else value for name, value in merged.items() if value not in ("", "false")}


def _quoted(value: str) -> str:
    """Quotes an option's value for a line of #SBATCH, in which sbatch splits words and drops what follows #.

    Inside double quotes a backslash keeps the next character (Slurm, src/sbatch/opt.c, _get_argument).
    """
    if not re.search(r"""[\s"'#\\]""", value):
        return value
    return '"' + re.sub(r'(["#\\])', r"\\\1", value) + '"'


def _step(job: Job) -> str:
    """Returns the step that trains, in the background."""
    if job.task_per_rank:
        shown = 'logs=("$log-0.out")\n'
        layout = f"--ntasks-per-node={job.nproc_per_node} --distribution=block"
        train = ['"${container[@]}"', '"$python"', "-m dist_train run", '"${arguments[@]}"']
    else:
        # torchrun numbers the nodes in any order, so rank 0 may be on each: the first rank of each is shown.
        shown = 'logs=()\nfor ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do logs+=("$log-$node.out"); done\n'
        layout = "--ntasks-per-node=1"
        agent = shlex.join(word for word in agent_options(job) if word != job.logs)
        agent = agent.replace("--log-dir", '--log-dir "$home/logs"')
        # The first node of the allocation is the host, whatever its name resolves to.
        each = 'PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0))" PET_LOCAL_ADDR=$SLURMD_NODENAME exec "$@"'
        train = [
            f"bash -c {shlex.quote(each)} bash",
            '"${container[@]}"',
            '"$python"',
            "-m torch.distributed.run",
            '--nnodes "$SLURM_JOB_NUM_NODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT"',
            '--rdzv-id "$job.${SLURM_RESTART_COUNT:-0}"',
            agent,
            "-m dist_train run",
            '"${arguments[@]}"',
        ]
    srun = f'srun "${{srun_options[@]}}" --nodes="$SLURM_JOB_NUM_NODES" {layout} --kill-on-bad-exit=1'
    srun += ' --output="${log//%/%%}-%t.out"'
    asked = f"DIST_TRAIN_NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * {job.nproc_per_node}))"
    asked += ' DIST_TRAIN_EXIT_FILE="$home/logs/exit_78"'
    return shown + " \\\n  ".join([asked, srun, *train]) + " &\n"


_YOURS = """
# ---- Yours: modules, environment, container --------------------------------------------------------------
# module load python
# source path/to/venv/bin/activate
container=() # Apptainer: container=(apptainer exec --nv image.sif)
# Pyxis: srun_options=(--container-image=image.sqsh "--container-mounts=$PWD" "--container-workdir=$PWD")
srun_options=()
"""

_SETTINGS = """\
# ----------------------------------------------------------------------------------------------------------

"""

_NO_ARRAY = """
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  echo "dist-train: the tasks of an array cannot share one address: give --run.dir DIR, a folder" >&2
  exit 78
fi
"""

_BEFORE = """
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # each task is a run of its own; %a in an option is its number
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  run_dir=$run_dir-$SLURM_ARRAY_TASK_ID
  arguments=("${arguments[@]//%a/$SLURM_ARRAY_TASK_ID}" --run.dir "$run_dir")
fi
home=$run_dir$suffix
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch
fi

field() { sed -n "s/^ *\\"$1\\": *\\"\\{0,1\\}\\([^\\",]*\\).*/\\1/p" "$home/status.json" 2>/dev/null | head -n 1; }
checkpoint() { cat "$home/checkpoints/latest.json" 2>/dev/null; }
first() { # runs python on the first node
  srun "${srun_options[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=0 "${container[@]}" "$python" "$@"
}

rm -f "$home/logs/exit_78" "$home/STOP" # they are of an earlier job
asked=
ask_to_stop() {
  echo "dist-train: asking the ranks to stop ($1)"
  asked=$1
  [ ! -d "$home" ] || touch "$home/STOP"
}
trap 'ask_to_stop USR2' USR2
trap 'ask_to_stop TERM' TERM
requeue() { # the end of a job that was stopped
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
    echo "dist-train: not requeued: it was $max_requeues times already"
  elif ! scontrol show job "$job" | grep -q JobState=RUNNING; then
    echo "dist-train: not requeued: the job was cancelled"
  else
    scontrol requeue "$job" && echo "dist-train: requeued"
  fi
  exit 75
}

first -m dist_train config check "${arguments[@]}"
code=$?
if [ "$code" = 143 ]; then
  asked=TERM # Slurm tells a step before its script
elif [ "$code" != 0 ]; then
  exit "$code"
fi
export MASTER_ADDR MASTER_PORT
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${port:-$(first -m dist_train.cluster.ports "$job.${SLURM_RESTART_COUNT:-0}")}
[ -n "$asked" ] || [ -n "$MASTER_PORT" ] || exit 78

attempt=$(field restarts) saved=$(checkpoint)
mkdir -p "$home/logs" || exit 78
log=$home/logs/slurm-$job.${SLURM_RESTART_COUNT:-0}
[ -z "$asked" ] || requeue # nothing has begun, so there is nothing to save; from here on STOP asks the ranks

"""

_AFTER = """ranks=$!
tail --pid="$ranks" -q -n +1 -F "${logs[@]}" 2>/dev/null & # what rank 0 prints
shown=$!
wait "$ranks"
code=$?
while kill -0 "$ranks" 2>/dev/null; do # a trap ended the wait, not the ranks
  wait "$ranks"
  code=$?
done
wait "$shown"

state=failed
if [ "$code" = 0 ] || [ "$(field restarts)" != "$attempt" ]; then # else status.json is an earlier attempt's
  state=$(field state)
fi
echo "dist-train: $state, srun returned $code"
case $state in
  done) exit 0 ;;
  preempted) ;;
  *) [ "$code" = 78 ] || [ -e "$home/logs/exit_78" ] && exit 78 # agents turn it into 1
    exit 1 ;;
esac
if [ "$(checkpoint)" = "$saved" ]; then
  echo "dist-train: not requeued: no checkpoint since the start of this attempt"
  exit 75
fi
requeue
"""
