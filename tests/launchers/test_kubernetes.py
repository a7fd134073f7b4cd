"""The manifest that `launch kubernetes` prints: held to JobSet's schema, its pods' command given to a shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.cli import main
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, EXIT_PREEMPTED, UsageError
from dist_train.launchers.job import Job
from dist_train.launchers.kubernetes import manifest, name_of
from tests.support.ranks import ROOT, free_port
from tests.support.slurm_cluster import SMALL

SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
NEEDED = ("--image", "registry.example/train:1", "--claim", "runs")


@pytest.fixture
def jsonschema() -> Any:
    return pytest.importorskip("jsonschema")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str, settings: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """ConfigMap and JobSet of `launch kubernetes --dry-run`."""
    assert main(["launch", "kubernetes", *NEEDED, *words, "--dry-run", "small.yaml", *settings]) == EXIT_DONE
    config, job = yaml.safe_load_all(capsys.readouterr().out)
    return config, job


def pods(job: Any) -> Any:
    """The Job's part of a JobSet."""
    return job["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--nodes", "4", "--nproc-per-node", "8", "--gpus-per-process", "1"),
        ("--nodes", "1:3", "--memory", "32Gi", "--namespace", "on", "--env", "NO=yes: 'it' is", "--requeues", "0"),
    ],
)
def test_manifests_keep_to_the_schema_of_jobset(
    words: tuple[str, ...], folder: Path, jsonschema: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config, job = printed(capsys, *words, settings=("--run.name", "yes"))
    jsonschema.validate(job, SCHEMA)
    assert config["metadata"]["name"] == job["metadata"]["name"] == "yes"
    assert config["data"] == {"config.yaml": SMALL}


def expanded(text: str, known: dict[str, str]) -> str:
    """As Kubernetes: $$ is $, and $(NAME) a variable where there is one."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda found: known.get(found[1], found[0]) if found[1] else "$", text)


def test_kubernetes_puts_no_variables_into_values_and_settings(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "a$$b$(POD_IP)$HOME"
    _, job = printed(capsys, "--env", f"A={value}", settings=("--run.dir", f"runs/{value}"))
    (agent,) = pods(job)["template"]["spec"]["containers"]
    known = {"POD_IP": "10.0.0.1"}
    assert expanded(agent["env"][-1]["value"], known) == value
    assert f"--run.dir 'runs/{value}'" in expanded(agent["args"][0], known)


def test_data_of_the_pods_need_not_be_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--data.root", "/data/of/pods")
    _, job = printed(capsys, settings=settings)
    (agent,) = pods(job)["template"]["spec"]["containers"]
    assert "--data.root /data/of/pods" in agent["args"][0]
    assert main(["launch", "torchrun", "--dry-run", "small.yaml", *settings]) == EXIT_CONFIG


def test_the_schema_knows_a_field_that_jobset_does_not(
    folder: Path, jsonschema: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, job = printed(capsys)
    pods(job)["template"]["spec"]["restartPolicies"] = "Never"
    with pytest.raises(jsonschema.ValidationError, match="restartPolicies"):
        jsonschema.validate(job, SCHEMA)


def test_exit_codes_decide_whether_pods_start_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, job = printed(capsys, "--nodes", "2:4", "--requeues", "2")
    spec = pods(job)
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ["evicted"])
    }
    assert rules == {"evicted": "Ignore", EXIT_PREEMPTED: "Ignore", EXIT_CONFIG: "FailJob"}
    assert spec["backoffLimit"] == 8, "each failure of the run costs a failure of all its pods"
    assert spec["parallelism"] == spec["completions"] == 4
    assert spec["successPolicy"] == {"rules": [{"succeededCount": 1}]}
    assert "successPolicy" not in pods(printed(capsys, "--nodes", "4")[1])


def test_pods_have_time_to_save(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, job = printed(capsys, settings=("--stop.grace", "120"))
    spec = pods(job)["template"]["spec"]
    (agent,) = spec["containers"]
    assert "--shutdown-timeout 135" in agent["args"][0]
    assert spec["terminationGracePeriodSeconds"] > 135


def in_a_shell(job: Any, index: int, config: Path, *more: str, host: str = "") -> subprocess.Popen[str]:
    """Runs the command of a pod here."""
    (agent,) = pods(job)["template"]["spec"]["containers"]
    command = agent["args"][0].replace("/etc/dist_train/config.yaml", f"{' '.join(more)} {config}")
    command = command.replace("small-node-0-0.small", host or "small-node-0-0.small")
    environ = os.environ | {"JOB_COMPLETION_INDEX": str(index), "POD_IP": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*agent["command"], command], env=environ, cwd=config.parent, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("index", "hosts"), [(0, "is_host=true"), (2, "is_host=false")])
def test_a_pod_s_command_starts_torchrun(
    index: int, hosts: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--python", sys.executable, "--nodes", "1:3", "--nproc-per-node", "2")
    _, job = printed(capsys, *words, settings=("--run.seed", "3"))
    process = in_a_shell(job, index, folder / "small.yaml", "--dry-run")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_DONE, said
    for part in (
        "--nnodes 1:3",
        "--nproc-per-node 2",
        "--max-restarts 10",
        "--rdzv-endpoint small-node-0-0.small:29400",
        hosts,
        "--local-addr 127.0.0.1",
        "GLOO_SOCKET_IFNAME=lo",
        "--run.seed 3 --run.dir runs/small",
    ):
        assert part in said


@pytest.mark.slow
def test_the_commands_of_two_pods_train_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--python", sys.executable, "--nodes", "2", "--port", str(free_port()))
    _, job = printed(capsys, *words)
    both = [in_a_shell(job, index, folder / "small.yaml", host="127.0.0.1") for index in range(2)]
    try:
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [EXIT_DONE, EXIT_DONE], said
    assert json.loads((folder / "runs/small/results.json").read_text())["world_size"] == 2


def test_names_are_made_fit_for_kubernetes() -> None:
    assert [name_of(name) for name in ("ResNet_18.b-", "007", "a")] == ["resnet-18-b", "run-007", "a"]
    with pytest.raises(UsageError, match="without a letter a to z or a digit"):
        name_of("\u0434\u0430")


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\n",
        " first: 1\n",
        "a: 1",
        "a: 1\n\n\n",
        "\na: 1\n",
        "a:\t1\r\n",
        "a: \u0085\n",
        "# \u00e9\n\n  'b': \"c\" \n",
        "",
    ],
)
def test_any_configuration_reads_back_as_it_was(text: str) -> None:
    job = Job(arguments=("a.yaml",), run_dir="r", home="r", image="i", claim="c", config_text=text)
    assert next(yaml.safe_load_all(manifest(job)))["data"] == {"config.yaml": text}


@pytest.mark.parametrize(
    ("words", "wrong", "hint"),
    [
        (["small.yaml"], "kubernetes needs --image and --claim", "--claim NAME"),
        ([*NEEDED, "--mount", "runs", "small.yaml"], "must be an absolute path", "--mount PATH"),
        ([*NEEDED, "small.yaml", "--run.dir", "/scratch/a"], "outside the shared volume", "--run.dir runs/NAME"),
        ([*NEEDED, "small.yaml", "--run.dir", "../a"], "outside the shared volume", "--mount"),
        ([*NEEDED, "small.yaml", "--run.name", "x" * 46], "longer than the 45 characters", "--run.name NAME"),
        ([*NEEDED, "--submit", "small.yaml"], "--submit is not for kubernetes", "slurm"),
        ([*NEEDED, "small.yaml"], "there is no kubectl here", "--dry-run"),
    ],
)
def test_what_cannot_be_started_is_refused_in_words(
    words: list[str],
    wrong: str,
    hint: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert main(["launch", "kubernetes", *words]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert wrong in said and hint in said and "Traceback" not in said


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="only where kubectl is installed")
def test_kubectl_without_a_cluster_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    cluster = {"name": "none", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "none", "context": {"cluster": "none", "user": ""}}
    (folder / "kubeconfig").write_text(
        json.dumps({"kind": "Config", "clusters": [cluster], "contexts": [context], "current-context": "none"})
    )
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    assert main(["launch", "kubernetes", *NEEDED, "small.yaml"]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "kubectl refused the job" in said and str(port) in said and "Traceback" not in said


def test_one_pod_whose_run_is_at_a_store_needs_no_volume(
    folder: Path, jsonschema: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", "kubernetes", "--image", "i", "--secret", "store-key", "--dry-run"]
    place = ["small.yaml", "--run.dir", "s3://bucket/run"]
    assert main([*words, *place]) == EXIT_DONE
    _, job = yaml.safe_load_all(capsys.readouterr().out)
    jsonschema.validate(job, SCHEMA)
    spec = pods(job)["template"]["spec"]
    assert spec["volumes"][0] == {"name": "shared", "emptyDir": {}}
    (agent,) = spec["containers"]
    assert agent["envFrom"] == [{"secretRef": {"name": "store-key"}}]
    assert "--run.dir s3://bucket/run" in agent["args"][0] and "--run.spool" not in agent["args"][0]
    assert main([*words, "--nodes", "2", *place]) == EXIT_CONFIG
    assert "kubernetes needs --claim" in capsys.readouterr().err
    assert main([*words, "--nodes", "2", "--claim", "c", *place]) == EXIT_DONE
    _, job = yaml.safe_load_all(capsys.readouterr().out)
    assert "--run.spool /workspace/working-copies" in pods(job)["template"]["spec"]["containers"][0]["args"][0]
