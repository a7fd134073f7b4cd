"""Wrong network settings end at once with an error that names the setting; harmless ones give no false alarm."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time

import pytest

from dist_train.cluster.interfaces import Interface, gloo_address, interfaces
from dist_train.cluster.rank_plan import RankPlan
from dist_train.config.tree import RunConfig
from dist_train.distributed import preflight
from dist_train.distributed import process_group as forming
from dist_train.distributed.preflight import find_rank_0, interface_problems
from dist_train.distributed.process_group import join
from dist_train.errors import EXIT_CONFIG, DistTrainError, SetupError
from tests.support.ranks import Ranks, free_port

PRESENT = [
    Interface("lo", True, ("127.0.0.1", "::1")),
    Interface("eth0", True, ("10.0.0.5",)),
    Interface("ib0", False, ("10.1.0.5",)),
    Interface("bond0", True, ()),
]


def test_the_interfaces_are_those_of_the_system() -> None:
    found = {each.name: each for each in interfaces()}
    assert set(found) == {name for _, name in socket.if_nameindex()}
    assert found["lo"].up and found["lo"].addresses[0] == "127.0.0.1" and not found["lo"].reaches_others


@pytest.mark.parametrize(
    ("variables", "cuda", "named"),
    [
        ({}, True, None),
        ({"GLOO_SOCKET_IFNAME": ""}, True, None),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, True, None),
        ({"GLOO_SOCKET_IFNAME": "lo,eth0"}, True, None),
        ({"GLOO_SOCKET_IFNAME": "eth"}, True, "has no interface 'eth'"),
        ({"GLOO_SOCKET_IFNAME": "eth0,eth1"}, True, "has no interface 'eth1'"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, True, "ib0 is down"),
        ({"GLOO_SOCKET_IFNAME": "bond0"}, True, "bond0 has no address"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, True, None),  # NCCL matches prefixes of names,
        ({"NCCL_SOCKET_IFNAME": "=eth"}, True, "'=eth'"),  # whole names after =,
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, True, None),  # and excludes names after ^.
        ({"NCCL_SOCKET_IFNAME": "ens,ib"}, True, "'ens,ib'"),
        ({"NCCL_SOCKET_IFNAME": "ens"}, False, None),
    ],
)
def test_a_variable_that_names_an_interface_which_ranks_cannot_use_is_named(
    variables: dict[str, str], cuda: bool, named: str | None
) -> None:
    problems = list(interface_problems(variables, PRESENT, cuda))
    if named is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.place in variables and named in problem.message and problem.hint


def test_gloos_address_is_that_of_the_first_named_interface_else_one_of_the_host_names() -> None:
    assert gloo_address({"GLOO_SOCKET_IFNAME": "eth0,lo"}, PRESENT) == "10.0.0.5"
    own = [address for each in interfaces() for address in each.addresses]
    assert gloo_address({}, PRESENT) in own or gloo_address({}, PRESENT).startswith("127.")


def second_rank(address: str, port: int, local_world_size: int = 2) -> RankPlan:
    return RankPlan("torchrun", 1, 1 % local_world_size, 2, local_world_size, address, port)


def test_a_rank_0_that_starts_late_is_waited_for_and_what_is_waited_for_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "_SAY_SECONDS", 0.3)
    port, said = free_port(), []
    spoken = threading.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        spoken.set()

    def start_late() -> None:
        spoken.wait(20)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(20)
            server.accept()[0].close()

    late = threading.Thread(target=start_late)
    late.start()
    find_rank_0(second_rank("127.0.0.1", port), {}, say)
    late.join()
    (sentence,) = said
    assert (
        f"MASTER_ADDR:MASTER_PORT, 127.0.0.1:{port}: connection refused" in sentence
        and "is rank 0 started?" in sentence
    )


def test_where_nobody_listens_the_error_says_where_and_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_CONNECT_SECONDS", 0.3)
    port = free_port()
    with pytest.raises(SetupError, match=f"127.0.0.1:{port}: connection refused") as caught:
        find_rank_0(second_rank("127.0.0.1", port), {}, pytest.fail)
    assert "firewall" in caught.value.hint and caught.value.exit_code == EXIT_CONFIG


def test_a_loopback_address_for_several_nodes_is_named_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_LOOPBACK_SECONDS", 0.3)
    with pytest.raises(SetupError) as caught:
        find_rank_0(second_rank("127.0.0.1", free_port(), local_world_size=1), {}, pytest.fail)
    assert "MASTER_ADDR is a loopback address, at which each node reaches only itself" in caught.value.hint


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a..b"])
def test_a_name_that_does_not_resolve_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_NAME_SECONDS", 0.0)
    with pytest.raises(SetupError, match=f"MASTER_ADDR is '{name}', which does not resolve"):
        find_rank_0(second_rank(name, 12345), {}, pytest.fail)


# Real ranks.


@pytest.mark.heavy
def test_a_wrong_interface_ends_both_ranks_with_78_and_its_name() -> None:
    with Ranks(2, ["-m", "tests.distributed.test_preflight"], {"GLOO_SOCKET_IFNAME": "nope0"}) as ranks:
        start = time.monotonic()
        assert ranks.wait(60) == [EXIT_CONFIG, EXIT_CONFIG], ranks.printed()
        assert time.monotonic() - start < preflight._LOOPBACK_SECONDS
        for number in range(2):
            assert "GLOO_SOCKET_IFNAME is 'nope0'" in ranks.output(number), ranks.printed()
            assert "Traceback" not in ranks.output(number)


def test_a_master_port_that_is_taken_is_named_by_the_rank_that_would_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(SetupError, match=f"MASTER_PORT {port} on 127.0.0.1, .* is taken") as caught,
            join(RunConfig(device="cpu", timeout=5)),
        ):
            pytest.fail("a world at a port that is taken")
    assert caught.value.exit_code == EXIT_CONFIG and "ss -tlnp" in caught.value.hint


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_a_master_port_at_which_something_else_answers_is_named_by_a_rank_that_would_connect(
    banner: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forming, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        accepted: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):  # the socket is closed at the end of the test
                while True:
                    accepted.append(other.accept()[0])
                    accepted[-1].sendall(banner)

        threading.Thread(target=accept, daemon=True).start()
        port = str(other.getsockname()[1])
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        with (
            pytest.raises(SetupError, match=f"MASTER_PORT {port} on 127.0.0.1, .* is taken") as caught,
            join(RunConfig(device="cpu", timeout=5)),
        ):
            pytest.fail("a world at somebody else's port")
        for each in accepted:
            each.close()
    assert "another MASTER_PORT" in caught.value.hint


def main() -> int:
    try:
        with join(RunConfig(device="cpu", timeout=30)) as world:
            print(json.dumps(world.gather(world.rank)))
    except DistTrainError as error:
        print(f"dist-train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
