"""Tests gloo and the preflight between two network namespaces that act as two machines with their own host names."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.config.tree import RunConfig
from dist_train.distributed.process_group import join
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, DistTrainError
from dist_train.pipeline import opening
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, Ranks, free_port

SECONDS = 45.0  # far below the 300 s of the rendezvous
ADDRESSES = ("192.168.77.1", "192.168.77.2")


def _why_not() -> str | None:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "only as root, with ip and unshare"
    name = f"dt-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False, timeout=10)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=10)
    return None if made.returncode == 0 else "only where network namespaces can be made"


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Creates two namespaces connected by a virtual cable, with ADDRESSES."""
    reason = _why_not()
    if reason is not None:
        pytest.skip(reason)
    names = [f"dt-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"dt{os.getpid() % 10**6}{side}" for side in "ab"]

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True, timeout=10)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def started(rank: int, namespace: str | None, host_address: str, port: int, folder: Path) -> subprocess.Popen[str]:
    """Starts rank `rank` of two, one per node, on a node whose host name resolves to `host_address`."""
    hosts = folder / f"hosts{rank}"
    hosts.write_text(f"127.0.0.1 localhost\n{host_address} node{rank}\n")
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM", "GLOO"))
    }
    variables |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
    }
    variables |= {
        "MASTER_ADDR": ADDRESSES[0] if namespace else "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    # `ip netns exec` makes its own mount namespace, so the host names are mounted after it.
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
    own_names = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", f"node{rank}", str(hosts)]
    return subprocess.Popen(
        [*inside, *own_names, sys.executable, "-m", "tests.distributed.test_preflight"],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outcome(namespaces: list[str | None], host_addresses: tuple[str, str], folder: Path) -> list[tuple[int, str]]:
    """Returns the exit code and output of both ranks."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(2):
            process = started(rank, namespaces[rank], host_addresses[rank], port, folder)
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(process)
        return [(process.wait(), printed) for process in ranks for printed in [process.communicate(timeout=SECONDS)[0]]]


@pytest.mark.slow
def test_host_names_that_resolve_to_loopback_on_two_machines_end_both_at_once_with_the_setting(
    machines: list[str], tmp_path: Path
) -> None:
    start = time.monotonic()
    for code, printed in outcome([*machines], ("127.0.1.1", "127.0.1.1"), tmp_path):
        assert code == EXIT_CONFIG, printed
        assert "its host name, node0, resolves to 127.0.1.1, a loopback address" in printed
        assert "GLOO_SOCKET_IFNAME" in printed and "Traceback" not in printed
    assert time.monotonic() - start < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_one_such_machine_among_two_is_named(wrong: int, machines: list[str], tmp_path: Path) -> None:
    addresses = ("127.0.1.1", ADDRESSES[1]) if wrong == 0 else (ADDRESSES[0], "127.0.1.1")
    for code, printed in outcome([*machines], addresses, tmp_path):
        assert code == EXIT_CONFIG and f"host name, node{wrong}, resolves to 127.0.1.1" in printed, printed


@pytest.mark.slow
def test_host_names_that_resolve_to_the_machines_addresses_are_right(machines: list[str], tmp_path: Path) -> None:
    for code, printed in outcome([*machines], ADDRESSES, tmp_path):
        assert code == EXIT_DONE and "[0, 1]" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.1.1", "198.51.100.7"])
def test_nodes_that_are_one_machine_may_have_any_host_name(address: str, machines: list[str], tmp_path: Path) -> None:
    for code, printed in outcome([None, None], (address, address), tmp_path):
        assert code == EXIT_DONE and "[0, 1]" in printed, printed


@pytest.mark.slow
def test_a_run_directory_that_not_all_ranks_see_is_named(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    with Ranks(2, ["-m", "tests.distributed.test_preflight_machines_integration", str(tmp_path)]) as ranks:
        assert ranks.wait(SECONDS) == [EXIT_CONFIG, EXIT_CONFIG], ranks.printed()
        for number in range(2):
            assert "run.dir is not shared: ranks [1] do not see" in ranks.output(number), ranks.printed()
            assert "--run.dir DIR" in ranks.output(number) and "Traceback" not in ranks.output(number)


def main(folder: str) -> int:
    """Runs with an unshared run directory: the ranks see different folders at its path, and rank 1's is missing."""
    opening._SEEN_SECONDS = 2.0  # a longer wait would not help, the folder is not shared
    try:
        with join(RunConfig(device="cpu", timeout=40)) as world:
            run_dir = RunDir(Path(folder) / str(world.rank) / "run")
            if world.is_main:
                run_dir.path.mkdir()
            opening.check_shared(run_dir, world)
    except DistTrainError as error:
        print(f"dist-train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
