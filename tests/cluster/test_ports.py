"""Ports to meet at: one order for all ranks, outside the ephemeral range, free."""

from __future__ import annotations

import socket
import subprocess
import sys
from itertools import islice

import pytest

from dist_train.cluster.ports import candidates, ephemeral_range, first_free, is_free
from dist_train.errors import SetupError

LINUX = (32768, 60999)


@pytest.mark.parametrize("ephemeral", [LINUX, (10000, 65535), (1024, 60000), (20000, 20000)])
def test_candidates_lie_outside_the_ephemeral_range_and_come_once_each(ephemeral: tuple[int, int]) -> None:
    ports = list(candidates("job 7", ephemeral))
    assert len(ports) == len(set(ports)) > 0
    assert all(1024 <= port <= 65535 and not ephemeral[0] <= port <= ephemeral[1] for port in ports)
    assert ports == list(candidates("job 7", ephemeral))


def test_jobs_one_after_the_other_start_at_different_ports() -> None:
    firsts = {next(candidates(str(job), LINUX)) for job in range(1000, 1100)}
    assert len(firsts) > 95


def test_a_taken_port_is_passed_over() -> None:
    free = (port for port in candidates("a job", ephemeral_range()) if is_free(port))
    first, second = islice(free, 2)
    assert first_free("a job") == first
    with socket.socket(socket.AF_INET6) as listener:  # as a store listens: on IPv6 and IPv4 at once
        listener.bind(("::", first))
        listener.listen()
        assert not is_free(first)
        assert first_free("a job") == second


def test_where_every_port_is_ephemeral_the_setting_is_named() -> None:
    with pytest.raises(SetupError, match="ephemeral range, 1024 to 65535") as caught:
        first_free("job", (1024, 65535))
    assert "sysctl" in caught.value.hint


def test_where_none_is_free_no_other_is_taken_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.cluster.ports.is_free", lambda port: False)
    with pytest.raises(SetupError, match="are taken on this node"):
        first_free("job")


def test_a_batch_script_can_ask_for_it() -> None:
    command = [sys.executable, "-m", "dist_train.cluster.ports", "77"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert int(answer.stdout) in list(candidates("77", ephemeral_range())), answer.stderr
