"""`dist-train doctor` from outside, on this machine: what it prints, what it returns, and that no secret is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.errors import EXIT_CONFIG, EXIT_DONE
from tests.support.ranks import ROOT

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-aws",
    "HF_TOKEN": "hf_a-secret-of-a-hub",
    "DATABASE_URL": "postgres://me:a-secret-of-a-database@host/db",
    "WANDB_BASE_URL": "https://me:a-secret-in-a-url@wandb.example",
}
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def doctor(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in OTHERS and not name.startswith(("SLURM", "TORCHEL"))
    }
    environ = clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")])} | more
    command = [sys.executable, "-m", "dist_train", "doctor", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=200)


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@pytest.mark.heavy
def test_what_is_good_ends_with_0_and_is_plain_text_without_secrets(tmp_path: Path) -> None:
    done = doctor(tmp_path, *only("ranks", "network", "machine", "slurm", "wandb"), **SECRETS)
    assert done.returncode == EXIT_DONE and done.stderr == "", done.stdout + done.stderr
    printed = done.stdout
    assert [line for line in printed.splitlines()[:-1] if not line.startswith(" ")] == [
        "ranks",
        "network",
        "machine",
        "slurm",
        "wandb",
    ]
    assert "  good     one process: no launcher's variables are set" in printed
    assert "wandb would be online: an API key is configured" in printed
    assert printed.splitlines()[-1].startswith("nothing bad")
    assert set(printed) <= {*map(chr, range(32, 127)), "\n"}
    assert not any(secret in printed or secret.rpartition("://")[2] in printed for secret in SECRETS.values())
    assert "a-secret" not in printed
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_contradicts_itself_ends_with_78_and_says_how(tmp_path: Path) -> None:
    done = doctor(tmp_path, *only("ranks"), "--json", RANK="2", WORLD_SIZE="2")
    assert done.returncode == EXIT_CONFIG, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["exit_code"] == EXIT_CONFIG
    (section,) = told["sections"]
    problem, decided = section["lines"]
    assert (
        problem["level"] == "bad"
        and "RANK is 2, but WORLD_SIZE is 2" in problem["text"]
        and "torchrun" in problem["hint"]
    )
    assert decided["text"] == "decided by RANK=2, WORLD_SIZE=2"


def test_a_configuration_with_mistakes_is_bad_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("run: {name: x}\ntrain: {epochs: 0}\nexprot: {}\n")
    done = doctor(tmp_path, "wrong.yaml", *only("ranks"))
    assert done.returncode == EXIT_CONFIG
    assert "train.epochs" in done.stdout and "exprot" in done.stdout and done.stdout.splitlines()[-1] == "2 bad"
    assert "one process" in done.stdout and "Traceback" not in done.stdout + done.stderr


def test_it_starts_without_torch_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    code = (
        "import sys; from dist_train.cli import main; code = main(['doctor', '--only', 'ranks']);"
        "sys.exit(code or ' '.join({'torch', 'numpy', 'rich'} & set(sys.modules)) or 0)"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    for arguments, hint in (
        (["--only", "netwrok"], "did you mean network?"),
        (["--seed", "1"], "usage: dist-train doctor"),
    ):
        refused = doctor(tmp_path, *arguments)
        assert refused.returncode == EXIT_CONFIG and hint in refused.stderr


@pytest.mark.slow
def test_the_whole_diagnosis_tries_every_backend_and_format_here_and_two_ranks_add(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--deep", "--json", **SECRETS)
    told = json.loads(done.stdout)
    lines = {section["name"]: [line["text"] for line in section["lines"]] for section in told["sections"]}
    assert done.returncode == told["exit_code"] == EXIT_DONE, done.stdout
    assert "MB/s" in lines["all-reduce"][0]
    assert [text.partition(":")[0] for text in lines["quantization"]] == ["pt2e", "fx", "eager"]
    assert [text.partition(":")[0] for text in lines["lowering"]] == ["openvino", "onnx", "executorch", "inductor"]
    tried = [line for section in told["sections"] if section["name"] == "lowering" for line in section["lines"]]
    assert all(line["level"] == "good" and "differs by" in line["text"] for line in tried), tried
    assert "a-secret" not in done.stdout and SECRETS["WANDB_API_KEY"] not in done.stdout
