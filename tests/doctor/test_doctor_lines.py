"""The doctor's checks and its lines for them: each level, a crash, a hang, and planted lines of other machines."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dist_train import registry
from dist_train.cluster.ports import is_free
from dist_train.data import shared_memory
from dist_train.doctor import disk, lowering, machine, network, ranks, wandb
from dist_train.doctor.base import Line, Section, Subject, bad, exit_code, good, summary, warning
from dist_train.doctor.checks import Check, run
from dist_train.doctor.versions import unmet
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED
from dist_train.registry import Entry
from tests.support.compilers import hide_compiler
from tests.support.ranks import free_port

NOTHING = Subject()


def planted(function: str, subject: Subject = NOTHING, deadline: float = 30.0) -> list[Line]:
    return asyncio.run(
        run(Check("planted", "the planted check", f"tests.support.planted_checks:{function}", deadline), subject)
    )


def test_a_check_says_good_warning_and_bad_and_what_it_prints_besides_is_not_its_answer() -> None:
    lines = planted("chatters", Subject("runs/x", ("onnx",)))
    assert lines == [
        good("all is well"),
        warning("not quite", "type this"),
        bad("runs/x ('onnx',)", "type that"),
    ]


@pytest.mark.parametrize(
    ("function", "said"), [("raises", "the check failed: KeyError: 'planted'"), ("is_killed", "ended by SIGSEGV")]
)
def test_a_check_that_crashes_is_a_bad_line_with_how_to_see_more_and_no_traceback(function: str, said: str) -> None:
    (line,) = planted(function)
    assert line.level == "bad" and line.exit_code == EXIT_FAILED
    assert line.text.startswith("the planted check: ") and said in line.text and "Traceback" not in line.text
    assert (
        line.hint == f"for the whole message: python -m dist_train.doctor.child tests.support.planted_checks:{function}"
    )


def test_a_check_that_crashes_in_its_clean_up_has_answered() -> None:
    assert planted("crashes_at_its_end") == [good("the answer")]


def test_a_check_that_hangs_is_a_bad_line_after_its_deadline_and_leaves_no_process(tmp_path: Path) -> None:
    (line,) = planted("hangs", Subject(str(tmp_path)), deadline=2.0)
    assert line.level == "bad" and line.text == "the planted check: no answer within 2 s" and line.hint
    started = int((tmp_path / "started").read_text())
    end = time.monotonic() + 10
    while _runs(started):
        assert time.monotonic() < end, "its child still runs"
        time.sleep(0.01)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_text_has_a_line_for_each_thing_and_what_to_type_below() -> None:
    section = Section("disk", (good("fast"), warning("small\n  very small", "buy another"), bad("full", "rm")))
    assert section.text().splitlines() == [
        "disk",
        "  good     fast",
        "  warning  small",
        "           very small",
        "           -> buy another",
        "  bad      full",
        "           -> rm",
    ]
    assert summary([section]) == "1 bad, 1 warning"


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([], EXIT_DONE),
        ([good("a"), warning("b", "c")], EXIT_DONE),
        ([bad("a", "b"), good("c")], EXIT_FAILED),
        ([bad("a", "b", EXIT_CONFIG), bad("c", "d")], EXIT_CONFIG),
    ],
)
def test_the_exit_code_is_that_of_the_worst_line(lines: list[Line], code: int) -> None:
    assert exit_code([Section("first", ()), Section("second", tuple(lines))]) == code


def test_what_the_configuration_asks_for_is_bad_where_it_is_missing_and_a_warning_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = Entry("nowhere:at_all", requires={"no_such_module": "no-such-package"})
    monkeypatch.setitem(registry.export_formats._entries, "openvino", missing)
    for wanted, level in (((), "warning"), (("openvino",), "bad")):
        (line,) = lowering.check_openvino(Subject(wanted=wanted))
        assert line.level == level and "no-such-package not installed" in line.text
        assert line.hint == "pip install 'dist-train[openvino,onnx]'"


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_compiler(monkeypatch)
    (line,) = lowering.check_inductor(Subject())
    assert line.level == "warning" and "no C++ compiler" in line.text and "g++" in line.hint


@pytest.mark.parametrize("check", [lowering.check_onnx, lowering.check_inductor])
def test_a_format_that_nobody_asks_for_is_not_tried(check: Callable[[Subject], Iterable[Line]]) -> None:
    (line,) = check(Subject())
    assert line.level == "good" and "--deep tries it" in line.text


def test_versions_that_do_not_go_together_are_found_in_the_packages_own_words() -> None:
    declared = {
        "torchvision": ["numpy", "torch==2.13.0", "gdown>=4.7.3; extra == 'gdown'"],
        "accelerate": ["torch>=2.0.0"],
        "timm": ["torch<2; extra == 'old'"],
        "dist-train": ["torch<2.16,>=2.14", "onnx>=1.23; extra == 'onnx'", "onnx>=1.23; extra == 'test'"],
    }
    installed = {"torch": "2.14.1+cpu", "torchvision": "0.28.0", "onnx": "1.20.0"}
    assert list(unmet(declared, installed)) == [
        ("torchvision", "torch==2.13.0", "2.14.1+cpu"),
        ("dist-train", "onnx>=1.23", "1.20.0"),
    ]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_is_read_in_both_versions(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machine.cgroup_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("workers", "batch_bytes", "free", "level", "said"),
    [
        (0, 0, 2**30, "good", "/dev/shm: 1024 MiB, 1024 MiB free"),
        (0, 0, 2**26, "warning", "64 MiB free: little for data workers"),
        (4, 2**26, 2**30, "warning", "the batches of 4 data workers may need 1088 MiB (4 each, of 64 MiB)"),
        (4, 2**25, 2**30, "good", "1024 MiB free"),
    ],
)
def test_shared_memory_that_workers_batches_do_not_fit_into_is_a_warning(
    workers: int, batch_bytes: int, free: int, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (machine, shared_memory):
        monkeypatch.setattr(module, "sizes", lambda *path: (free, free))
    (line,) = machine.check_shared_memory(Subject(workers=workers, batch_bytes=batch_bytes))
    assert line.level == level and said in line.text
    assert ("--shm-size" in line.hint) == (level == "warning")


def test_less_cores_by_quota_than_by_affinity_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (line,) = (each for each in machine.check_limits(Subject()) if each.text.startswith("cores: "))
    assert line.level == "warning" and "0.5 by its cgroup's quota" in line.text
    assert line.hint.startswith("--run.threads_per_rank 1 ")


def test_the_disk_of_a_run_directory_that_is_not_there_yet_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    room, fsync = disk.check(Subject(str(tmp_path / "runs" / "x")))
    assert "GiB free" in room.text and fsync.text.startswith("fsync there: ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_FULL", 2**60)
    (line,) = disk.check(Subject(str(tmp_path)))
    assert line.level == "bad" and "no room for checkpoints" in line.text and "--run.dir" in line.hint


@pytest.mark.parametrize(
    ("variables", "level", "said"),
    [
        ({}, "good", "wandb would be offline: no API key is configured"),
        ({"WANDB_API_KEY": "k" * 40}, "good", "wandb would be online: an API key is configured"),
        ({"WANDB_MODE": "disabled"}, "good", "wandb would be disabled, as WANDB_MODE says"),
        ({"WANDB_MODE": "online"}, "warning", "WANDB_MODE is online, but no API key is configured"),
        ({"WANDB_MODE": "s3cret"}, "bad", "WANDB_MODE is none of online, offline, disabled"),
    ],
)
def test_wandbs_mode_and_whether_there_is_a_key_are_told_but_never_the_value(
    variables: dict[str, str], level: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (line,) = wandb.check(Subject())
    assert line.level == level and line.text.startswith(said)
    assert not any(value in line.text + line.hint for value in ("k" * 40, "s3cret"))


def several_nodes(port: int) -> dict[str, str]:
    return {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC", "ACCELERATE_")) or name in several_nodes(0):
            monkeypatch.delenv(name)
    return monkeypatch


def test_the_plan_is_told_with_what_decided_it_and_a_loopback_address_for_several_nodes_is_a_warning(
    no_ranks: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    for name, value in several_nodes(port).items():
        no_ranks.setenv(name, value)
    decided, told, resolved, loopback = ranks.check(Subject())
    assert decided.text.startswith("decided by RANK=0, WORLD_SIZE=4, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR=127")
    assert told.text == f"rank 0 of 4, local rank 0 of 2, on 2 nodes; they meet at 127.0.0.1:{port}"
    assert resolved.level == "good" and loopback.level == "warning" and "loopback" in loopback.text


def test_a_port_that_is_taken_is_bad_for_the_rank_that_would_listen(no_ranks: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert not is_free(port)
        for name, value in several_nodes(port).items():
            no_ranks.setenv(name, value)
        last = list(ranks.check(Subject()))[-1]
        assert last.level == "bad" and f"MASTER_PORT {port}" in last.text and last.exit_code == EXIT_CONFIG
        no_ranks.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # then the agent listens there, and rightly so
        assert all(line.level != "bad" for line in ranks.check(Subject()))


def test_an_interface_that_is_not_there_is_bad_and_without_a_gpu_nccls_is_a_warning(
    no_ranks: pytest.MonkeyPatch,
) -> None:
    no_ranks.setenv("GLOO_SOCKET_IFNAME", "nope0")
    no_ranks.setenv("NCCL_SOCKET_IFNAME", "nope")
    gloo, nccl = [line for line in network.check_interfaces(Subject()) if line.level != "good"]
    assert gloo.level == "bad" and "'nope0'" in gloo.text and gloo.exit_code == EXIT_CONFIG
    assert nccl.level == ("bad" if Path("/dev/nvidiactl").exists() else "warning") and "NCCL_SOCKET_IFNAME" in nccl.text
