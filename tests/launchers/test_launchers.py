"""From a Job to commands and scripts; `launch/` holds what the functions give."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from dist_train.cli import main
from dist_train.config.load import load
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from dist_train.launchers import accelerate, slurm_script, torchrun
from dist_train.launchers.job import Job, failure, outcome

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
JOB = Job(
    arguments=("my config.yaml", "--run.seed", "3", "--run.dir", "runs/a"), run_dir="runs/a", home="runs/a", rdzv_id="a"
)


def text_of(job: Job) -> str:
    return " ".join(torchrun.command(job).words)


def test_one_node_stands_alone_and_several_meet_at_an_endpoint() -> None:
    one = text_of(replace(JOB, nproc_per_node=2))
    assert "--standalone" in one and "--nproc-per-node 2" in one and "--rdzv" not in one
    several = replace(JOB, nodes=(2, 4), endpoint="gpu1", port=29400, is_host=True, local_addr="10.0.0.1", restarts=3)
    words = text_of(replace(several, shutdown_timeout=90))
    for part in (
        "--nnodes 2:4",
        "--rdzv-backend c10d",
        "--rdzv-endpoint gpu1:29400",
        "--rdzv-id a",
        "--rdzv-conf is_host=true",
        "--local-addr 10.0.0.1",
        "--max-restarts 3",
        "--shutdown-timeout 90",
    ):
        assert part in words
    assert "--standalone" not in words
    assert words.endswith("-m dist_train run my config.yaml --run.seed 3 --run.dir runs/a")


@pytest.mark.parametrize("host", ["fd00::17", "[fd00::17]", "::1"])
def test_an_ipv6_endpoint_stands_in_brackets_before_its_port(host: str) -> None:
    job = replace(JOB, nodes=(2, 2), endpoint=host, port=29511, node_rank=0)
    bare = host.strip("[]")
    words = torchrun.command(job).words
    assert parse_rendezvous_endpoint(words[words.index("--rdzv-endpoint") + 1], 1) == (bare, 29511)
    words = accelerate.command(job).words
    assert words[words.index("--main_process_ip") + 1] == f"[{bare}]"


def test_one_node_keeps_its_local_address() -> None:
    assert "--standalone --local-addr 127.0.0.1" in text_of(replace(JOB, local_addr="127.0.0.1"))


@pytest.mark.parametrize(
    ("name", "passed"),
    [("localhost", False), ("pod-7f9c.invalid", True), ("192.0.2.199", True)],  # 192.0.2.0/24 is nobody's: RFC 5737
)
def test_a_host_name_that_leads_elsewhere_or_nowhere_is_not_used_on_one_node(
    name: str, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("socket.getfqdn", lambda: name)
    assert main(["launch", "torchrun", "--dry-run", "small.yaml"]) == EXIT_DONE
    shown = capsys.readouterr().out
    assert ("--local-addr 127.0.0.1" in shown) == ("GLOO_SOCKET_IFNAME=lo" in shown) == passed
    assert main(["launch", "torchrun", "--dry-run", "--local-addr", "127.0.0.2", "small.yaml"]) == EXIT_DONE
    assert "--standalone --local-addr 127.0.0.2" in capsys.readouterr().out


def test_several_nodes_find_rank_0_anew_after_each_restart_by_the_interface_of_their_address() -> None:
    several = replace(JOB, nodes=(2, 2), endpoint="gpu1", interface="eth1")
    environ = torchrun.command(several).environ
    assert environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert environ["GLOO_SOCKET_IFNAME"] == "eth1"
    own = replace(several, environment=(("GLOO_SOCKET_IFNAME", "ib0"),))
    assert torchrun.command(own).environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert set(torchrun.command(JOB).environ) == {"DIST_TRAIN_NUM_PROCESSES", "DIST_TRAIN_EXIT_FILE"}


def test_launch_names_the_interface_of_the_local_address_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    words = ["launch", "torchrun", "--dry-run", "--nodes", "2", "--endpoint", "gpu1", "--local-addr"]
    assert main([*words, "127.0.0.2", "small.yaml"]) == EXIT_DONE
    assert "GLOO_SOCKET_IFNAME=lo " in capsys.readouterr().out
    assert main([*words, "192.0.2.199", "small.yaml"]) == EXIT_DONE
    shown = capsys.readouterr()
    assert "GLOO_SOCKET_IFNAME" not in shown.out and "on a node that has 192.0.2.199" in shown.err
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert main([*words, "127.0.0.2", "small.yaml"]) == EXIT_DONE
    assert "GLOO_SOCKET_IFNAME" not in capsys.readouterr().out


def test_an_agent_waits_longer_than_the_ranks_may_take_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\nstop: {grace: 199.5}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "torchrun", "--dry-run", "small.yaml"]) == EXIT_DONE
    assert "--shutdown-timeout 215 " in capsys.readouterr().out
    assert main(["launch", "slurm", "--dry-run", "small.yaml"]) == EXIT_DONE
    script = capsys.readouterr().out
    assert "--shutdown-timeout 215 " in script and "--signal=B:USR2@260\n" in script
    assert main(["launch", "torchrun", "--dry-run", "--shutdown-timeout", "50", "small.yaml"]) == EXIT_DONE
    assert "--shutdown-timeout 50 " in capsys.readouterr().out


def test_nodes_that_are_given_no_port_find_the_same_one_and_another_job_s_find_another() -> None:
    several = replace(JOB, nodes=(2, 2), endpoint="gpu1")
    assert torchrun.port(several) == torchrun.port(replace(several, is_host=True, local_addr="10.0.0.2"))
    assert torchrun.port(several) != torchrun.port(replace(several, rdzv_id="b"))


def test_the_number_of_processes_asked_for_is_passed_on() -> None:
    assert torchrun.command(replace(JOB, nproc_per_node=2)).environ["DIST_TRAIN_NUM_PROCESSES"] == "2"
    assert replace(JOB, nodes=(2, 4), nproc_per_node=3).processes == "6:12"


def test_a_command_as_text_is_what_a_shell_makes_the_same_words_of() -> None:
    command = accelerate.command(replace(JOB, environment=(("NOTE", "it's 1"),)))
    *_, last = command.shell().splitlines()
    words = shlex.split(last)
    variables = [word for word in words if re.match(r"[A-Z_]+=", word)]
    assert "NOTE=it's 1" in variables
    assert tuple(words[len(variables) :]) == command.words


def test_accelerate_gets_the_one_kind_of_config_file_with_which_it_starts_several_processes() -> None:
    command = accelerate.command(replace(JOB, nproc_per_node=2))
    ((path, text),) = command.files.items()
    assert path == "runs/a/logs/accelerate.yaml" and path in command.words
    settings = yaml.safe_load(text)
    assert settings["distributed_type"] == "MULTI_GPU" and settings["use_cpu"] is True
    assert settings["num_processes"] == 2 and settings["num_machines"] == 1
    gpus = yaml.safe_load(accelerate.config_file(replace(JOB, nodes=(2, 2), nproc_per_node=8, gpus_per_process=1)))
    assert (gpus["use_cpu"], gpus["num_machines"], gpus["num_processes"]) == (False, 2, 16)


def test_a_user_s_own_accelerate_config_decides_the_number_of_processes_unless_one_is_asked_for() -> None:
    own = replace(JOB, config_file="mine.yaml")
    command = accelerate.command(own)
    assert not command.files and "mine.yaml" in command.words and "--num_processes" not in command.words
    assert "DIST_TRAIN_NUM_PROCESSES" not in command.environ
    asked = accelerate.command(replace(own, nproc_per_node=4))
    assert asked.words[asked.words.index("--num_processes") + 1] == asked.environ["DIST_TRAIN_NUM_PROCESSES"] == "4"
    assert yaml.safe_load(accelerate.config_file(JOB))["distributed_type"] == "NO"


def test_a_batch_job_asks_for_the_cores_of_all_its_processes() -> None:
    job = replace(JOB, nodes=(2, 2), nproc_per_node=4, cpus_per_process=3, gpus_per_process=1)
    agents, tasks = slurm_script.options(job), slurm_script.options(replace(job, task_per_rank=True))
    assert (agents["ntasks-per-node"], agents["cpus-per-task"], agents["gpus-per-node"]) == ("1", "12", "4")
    assert (tasks["ntasks-per-node"], tasks["cpus-per-task"], tasks["gpus-per-node"]) == ("4", "3", "4")


def test_options_of_sbatch_that_we_do_not_know_go_through_and_replace_ours() -> None:
    given = (("qos", "long"), ("exclusive", "true"), ("requeue", "false"), ("signal", "B:USR2@60"))
    head = [line for line in slurm_script.script(replace(JOB, sbatch=given)).splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --qos=long" in head and "#SBATCH --exclusive" in head and "#SBATCH --signal=B:USR2@60" in head
    assert not any("requeue" in line for line in head)
    assert len(head) == len({line.partition("=")[0] for line in head})


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("/a/b-%j.out", "/a/b-%j.out"),
        ("/my jobs/%j.out", '"/my jobs/%j.out"'),
        ("it's #2", '"it\'s \\#2"'),
        ('a"b\\c', '"a\\"b\\\\c"'),
    ],
)
def test_a_value_for_sbatch_stays_one_word(given: str, written: str) -> None:
    script = slurm_script.script(replace(JOB, sbatch=(("output", given),)))
    assert f"#SBATCH --output={written}" in script.splitlines()


@pytest.mark.parametrize("name", ["null", "-a", '"a"', "'a'", "a #b", "~", "it's $HOME 100%"])
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_ranks_get_the_run_directory_that_was_typed(
    launcher: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my #1.yaml").write_text("run: {name: small}\nstages: [train]\n")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", launcher, "--dry-run", "my #1.yaml", f"--run.dir=./{name}"]) == EXIT_DONE
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config, *settings = words[words.index("run") + 1 :]
    assert config == "my #1.yaml"
    assert load(config, settings, environ={}).config.run.dir == Path(name)


def test_a_line_break_in_an_option_stays_out_of_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\n")
    monkeypatch.chdir(tmp_path)
    words = ["launch", "slurm", "--dry-run", "--sbatch.comment"]
    assert main([*words, "a", "small.yaml", "--wandb.project", "a\ntouch b"]) == EXIT_DONE
    assert "\n# touch b'\n" in capsys.readouterr().out
    assert main([*words, "a\nb", "small.yaml"]) == EXIT_CONFIG
    assert "--sbatch.comment has a line break" in capsys.readouterr().err


def test_words_before_the_configuration_are_the_launcher_s_and_words_after_it_are_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\n")
    monkeypatch.chdir(tmp_path)
    ours = [
        "--sbatch.qos",
        "long",
        "--nodes=1:2",
        "--sbatch.mail-type=END",
        "--sbatch.comment=--x=y",
        "--env",
        "A=b c",
        "--sbatch.qos",
        "short",
    ]
    words = ["launch", "slurm", "--dry-run", *ours, "small.yaml"]
    assert main([*words, "--train.optim.lr=0.5", "--run.seed", "3", "--wandb.project=--mine"]) == EXIT_DONE
    script = capsys.readouterr().out
    for line in (
        "#SBATCH --nodes=1-2",
        "#SBATCH --mail-type=END",
        "#SBATCH --comment=--x=y",
        "#SBATCH --qos=short",
        "export A='b c'",
        "arguments=(small.yaml --train.optim.lr=0.5 --run.seed 3 --wandb.project=--mine --run.dir runs/small)",
    ):
        assert line in script.splitlines()
    assert main([*words, "--nodes", "3"]) == EXIT_CONFIG
    assert "nodes (--nodes): unknown key" in capsys.readouterr().err
    assert main([*words, "--sbatch.qos", "long"]) == EXIT_CONFIG
    assert "sbatch: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("task_per_rank", [False, True])
def test_a_batch_script_is_right_bash(task_per_rank: bool) -> None:
    job = replace(JOB, nodes=(1, 3), nproc_per_node=2, task_per_rank=task_per_rank, environment=(("A", "it's"),))
    script = slurm_script.script(job)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("torch.distributed.run" in script) != task_per_rank


RUNNING = {"state": "running", "restarts": 0}


@pytest.mark.parametrize(
    ("before", "after", "code", "expected"),
    [
        (None, {"state": "done", "restarts": 0}, 0, EXIT_DONE),
        ({"state": "done", "restarts": 0}, {"state": "done", "restarts": 0}, 0, EXIT_DONE),
        (None, {"state": "preempted", "restarts": 0}, 0, EXIT_PREEMPTED),
        (RUNNING, {"state": "preempted", "restarts": 1}, 1, EXIT_PREEMPTED),
        ({"state": "preempted", "restarts": 0}, {"state": "preempted", "restarts": 0}, 1, EXIT_FAILED),
        (RUNNING, {"state": "failed", "restarts": 1}, 1, EXIT_FAILED),
        (RUNNING, {"state": "running", "restarts": 1}, -9, EXIT_FAILED),
        (None, None, 1, EXIT_FAILED),
        (None, None, 0, EXIT_FAILED),
        (None, None, 78, EXIT_CONFIG),
        (RUNNING, {"state": "failed", "restarts": 1}, 78, EXIT_CONFIG),
    ],
)
def test_status_json_decides_the_exit_code(
    before: dict[str, object] | None, after: dict[str, object] | None, code: int, expected: int
) -> None:
    assert outcome(before, after, code) == expected


@pytest.mark.parametrize(
    ("after", "wrong", "expected"),
    [
        (RUNNING, False, EXIT_PREEMPTED),
        (RUNNING, True, EXIT_CONFIG),
        ({"state": "failed", "restarts": 1}, False, EXIT_FAILED),
    ],
)
def test_a_launch_that_is_stopped_before_its_ranks_begin_can_be_repeated(
    after: dict[str, object], wrong: bool, expected: int
) -> None:
    assert outcome(RUNNING, after, 1, wrong, asked=True) == expected


@pytest.mark.parametrize(
    ("after", "code", "expected"),
    [
        ({"state": "preempted", "restarts": 1}, 1, EXIT_PREEMPTED),
        ({"state": "running", "restarts": 2}, 1, EXIT_PREEMPTED),  # the others have begun again
        ({"state": "done", "restarts": 2}, 1, EXIT_DONE),
        ({"state": "failed", "restarts": 1}, 1, EXIT_FAILED),
    ],
)
def test_a_launch_whose_node_was_told_to_leave_an_elastic_run_can_be_repeated(
    after: dict[str, object], code: int, expected: int
) -> None:
    assert outcome(RUNNING, after, code, asked=True, elastic=True) == expected


def test_a_launch_that_was_told_to_leave_a_fixed_number_of_nodes_fails_where_its_ranks_are_gone() -> None:
    assert outcome(RUNNING, {"state": "running", "restarts": 1}, 1, asked=True) == EXIT_FAILED


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (RUNNING, "the run failed before it began"),
        ({"state": "failed", "restarts": 1, "error": "planted"}, "the run failed: planted"),
        (
            {"state": "running", "restarts": 1, "stage": "train", "step": 3},
            "the run failed in train at step 3: its ranks ended without a word, as if killed",
        ),
    ],
)
def test_why_a_launch_failed_is_said(after: dict[str, object], said: str) -> None:
    assert failure(RUNNING, after) == said


def made_by(file: Path) -> list[str]:
    """The words after `dist-train` in a file's line "Made by"."""
    (line,) = re.findall(r"^# Made by: dist-train (launch .*)$", file.read_text(), re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("name", ["torchrun.sh", "accelerate.sh", "slurm.sbatch", "kubernetes.yaml"])
def test_the_ready_files_are_what_launch_prints(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(made_by(LAUNCH / name)) == EXIT_DONE
    printed = capsys.readouterr().out
    ready = (LAUNCH / name).read_text()
    if name.endswith(".sh"):
        ready = "".join(line for line in ready.splitlines(keepends=True) if not line.startswith("#"))
    assert printed == ready, f"dist-train {shlex.join(made_by(LAUNCH / name))}"


@pytest.mark.parametrize("file", sorted((LAUNCH / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_ready_config_files_of_accelerate_are_those_that_launch_writes(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(made_by(file)) == EXIT_DONE
    _, _, rest = capsys.readouterr().out.partition("<<'EOF'\n")
    assert rest.partition("EOF\n")[0] == re.sub(r"(?m)^#.*\n", "", file.read_text())


@pytest.mark.parametrize(
    ("words", "wrong", "hint"),
    [
        ([], "launch needs a launcher", "torchrun,accelerate,slurm,kubernetes"),
        (["mpirun", "small.yaml"], "unknown command launch mpirun", "torchrun, accelerate, slurm, kubernetes"),
        (["torchrun"], "needs a configuration", "CONFIG"),
        (["torchrun", "--nproc-per-nod", "2", "small.yaml"], "no option --nproc-per-nod", "--nproc-per-node"),
        (["torchrun", "--train.epochs", "2", "small.yaml"], "no option --train.epochs", "come after it"),
        (["torchrun", "--submit", "small.yaml"], "--submit is not for torchrun", "slurm"),
        (
            ["torchrun", "--nproc-per-node", "0", "small.yaml"],
            "must be a whole number, at least 1",
            "--nproc-per-node P",
        ),
        (["torchrun", "--nodes", "3:2", "small.yaml"], "MIN:MAX", "--nodes N"),
        (["torchrun", "--port", "70000", "small.yaml"], "at most 65535", "--port PORT"),
        (["slurm", "--array", "0-1", "small.yaml"], "no option --array", "--sbatch.array 0-1"),
        (["torchrun", "--endpoint", "h:70000", "small.yaml"], "a host alone", "--endpoint HOST"),
        (["accelerate", "--endpoint", "[::1]:29500", "small.yaml"], "--endpoint [::1] --port PORT", "--endpoint HOST"),
        (["torchrun", "--env", "A", "small.yaml"], "NAME=VALUE", "--env NAME=VALUE"),
        (["torchrun", "--dry-run=1", "small.yaml"], "takes no value", "--dry-run"),
        (["torchrun", "--nodes", "--dry-run", "small.yaml"], "--nodes has no value", "--nodes N"),
        (["torchrun", "--nodes", "2", "small.yaml"], "need --endpoint", "on every node"),
        (["accelerate", "--nodes", "2", "--endpoint", "a", "small.yaml"], "need --node-rank", "--node-rank K"),
        (["accelerate", "--nodes", "1:2", "small.yaml"], "fixed number", "--nodes 2"),
        (["slurm", "--task-per-rank", "--restarts", "1", "small.yaml"], "--restarts is for torchrun", "leave one"),
        (["slurm", "--follow", "--sbatch.array", "0-1", "small.yaml"], "shows one job", "--submit"),
        (
            ["torchrun", "--nodes", "2", "--endpoint", "a", "--local-addr", "192.0.2.199", "small.yaml"],
            "at which this machine cannot listen",
            "one of this machine's own",
        ),
        (["torchrun", "small.yaml", "--train.epochs", "0"], "train.epochs", "greater than 0"),
        (["torchrun", "--python", "no/such/python", "small.yaml"], "is no program", "--python PATH"),
    ],
)
def test_wrong_words_end_with_78_and_what_to_type(
    words: list[str],
    wrong: str,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\n")
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert wrong in said and hint in said and "Traceback" not in said


def test_a_wrong_configuration_starts_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text("run: {name: small}\nstages: [train]\n")
    program = (
        "import sys; from dist_train.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code if 'torch' not in sys.modules else 'torch')"
    )
    command = [sys.executable, "-c", program, "launch", "torchrun", "--nproc-per-node", "2", "small.yaml"]
    done = subprocess.run(
        [*command, "--train.epochs", "0"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert list(tmp_path.iterdir()) == [config]


def test_a_folder_of_somebody_else_is_refused_before_anything_is_written_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text("run: {name: small}\nstages: [train]\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    for words in (["torchrun"], ["slurm", "--submit"]):
        assert main(["launch", *words, "small.yaml", "--run.dir", "own"]) == EXIT_CONFIG
        assert "not a run directory" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "own").iterdir()] == ["thesis.tex"]
