"""Kubernetes: the manifest of a JobSet, with torchrun's agent in each pod, and its submission by kubectl.

A pod runs `dist-train launch torchrun`, which turns an agent's exit codes into ours; the pod failure policy knows them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import PurePosixPath

from dist_train.addresses import is_address
from dist_train.errors import EXIT_CONFIG, EXIT_PREEMPTED, SetupError, UsageError
from dist_train.launchers.job import Job

CONFIG_FOLDER = "/etc/dist_train"
_PORT = 29400
_MORE_SECONDS = 15  # Kubernetes kills a pod so much later than its agent kills the ranks
_LONGEST = 45  # of the 63 characters of a pod's host name, NAME-node-0-INDEX
_MOST_BYTES = 1_000_000  # of a ConfigMap
_FIRST = '"$([ "$JOB_COMPLETION_INDEX" = 0 ] && echo true || echo false)"'


def manifest(job: Job) -> str:
    """Returns the ConfigMap and the JobSet as YAML.

    Raises:
        UsageError: the run directory is outside the shared volume, or the configuration is too long.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    home = PurePosixPath(job.mount, job.home)
    if not is_address(job.run_dir) and (not home.is_relative_to(job.mount) or ".." in home.parts):
        hint = f"--run.dir runs/NAME, which is in {job.mount}, or another --mount"
        raise UsageError(f"run.dir is {job.run_dir}, outside the shared volume at {job.mount}", hint)
    if len(job.config_text.encode()) > _MOST_BYTES:
        raise UsageError(f"{job.arguments[0]} is larger than a ConfigMap may be (1 MB)", "a shorter configuration")
    environment = Environment(
        loader=PackageLoader("dist_train.launchers", ""),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    environment.filters |= {"json": _json, "text": _text, "literal": _literal}
    least, most = job.nodes
    return environment.get_template("kubernetes.yaml").render(
        name=name_of(job.name),
        made_by=f"Made by: {job.made_by}".splitlines() if job.made_by else [],
        namespace=job.namespace,
        config=job.config_text,
        config_folder=CONFIG_FOLDER,
        least=least,
        most=most,
        backoff=job.requeues * most,
        preempted=EXIT_PREEMPTED,
        wrong=EXIT_CONFIG,
        grace=job.shutdown_timeout + _MORE_SECONDS,
        image=job.image,
        mount=job.mount,
        claim=job.claim,
        secret=job.secret,
        command=command(job),
        environment=job.environment,
        cpus=job.cpus_per_process * job.nproc_per_node,
        gpus=job.gpus_per_process * job.nproc_per_node,
        memory=job.memory,
    )


def command(job: Job) -> str:
    """Returns the command of each pod, for its shell: JOB_COMPLETION_INDEX and POD_IP differ."""
    name = name_of(job.name)
    least, most = job.nodes
    words = [
        *(job.python, "-m", "dist_train", "launch", "torchrun"),
        *("--nproc-per-node", str(job.nproc_per_node)),
        *("--restarts", str(job.restarts)),
        *("--shutdown-timeout", str(job.shutdown_timeout)),
    ]
    meeting = ""
    if most > 1:
        words += ["--nodes", str(least) if least == most else f"{least}:{most}"]
        words += ["--endpoint", f"{name}-node-0-0.{name}", "--port", str(job.port or _PORT), "--rdzv-id", name]
        meeting = f' --local-addr "$POD_IP" --is-host {_FIRST}'
    # All pods need one working copy of a run at an object store.
    spool = () if most == 1 or not is_address(job.run_dir) else ("--run.spool", f"{job.mount}/working-copies")
    arguments = (f"{CONFIG_FOLDER}/config.yaml", *spool, *job.arguments[1:])
    return f"exec {_literal(shlex.join(words))}{meeting} {_literal(shlex.join(arguments))}\n"


def name_of(run: str) -> str:
    """Returns the run's name as Kubernetes allows it: small letters, digits and dashes, a letter first.

    Raises:
        UsageError: it is too long, or has none of these.
    """
    name = re.sub("[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name:
        wrong = f"run.name is {run!r}, without a letter a to z or a digit, of which the pods' names are made"
        raise UsageError(wrong, "--run.name NAME")
    name = name if name[0].isalpha() else f"run-{name}"
    if len(name) > _LONGEST:
        wrong = f"run.name is {run!r}, longer than the {_LONGEST} characters that the pods' names have for it"
        raise UsageError(wrong, "--run.name NAME")
    return name


def apply(text: str) -> str:
    """Gives the manifest to kubectl; returns what it says.

    Raises:
        SetupError: there is no kubectl, or the cluster refused.
    """
    if shutil.which("kubectl") is None:
        raise SetupError("there is no kubectl here", "save the manifest where it is: launch kubernetes --dry-run")
    answer = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        hint = "kubectl config current-context tells which cluster is asked; --dry-run prints the manifest"
        if 'no matches for kind "JobSet"' in answer.stderr:
            hint = "install JobSet in the cluster first: jobset.sigs.k8s.io/docs/installation"
        raise SetupError(f"kubectl refused the job: {lines[-1]}", hint)
    return answer.stdout.strip()


def _literal(value: str) -> str:
    """Returns a text of arguments or variables as Kubernetes takes it, which puts other variables in for $(NAME)."""
    return value.replace("$", "$$")


def _json(value: str) -> str:
    return json.dumps(value)


def _text(value: str, indent: int) -> str:
    """Returns a text as a YAML scalar: in lines where a literal block keeps them as they are, else as JSON."""
    lines = value[:-1].split("\n")
    ordinary = value.endswith("\n") and lines[0].strip() == lines[0] != "" != lines[-1]
    if not ordinary or not all(line.isprintable() for line in lines):
        return _json(value)
    return "\n".join(["|", *(" " * indent + line if line else "" for line in lines)])
