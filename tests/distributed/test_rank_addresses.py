"""Ranks that would not reach each other, are misnumbered or share a GPU are told so before they connect."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch.distributed as dist

from dist_train.distributed.rank_addresses import (
    RankAddress,
    check_addresses,
    misnumbered,
    shared_gpu,
    unreachable,
)
from dist_train.errors import EXIT_CONFIG, SetupError


def rank(number: int, machine: str, address: str, named: str = "") -> RankAddress:
    return RankAddress(number, f"host-{machine}", machine, address, named, ("eth0",))


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([rank(0, "a", "127.0.1.1"), rank(1, "a", "127.0.1.1")], None),  # a laptop, a container, Slurm on one machine
        ([rank(0, "a", "192.168.0.1"), rank(1, "b", "192.168.0.2")], None),
        ([rank(0, "a", "127.0.1.1"), rank(1, "b", "127.0.1.1")], "host-a, resolves to 127.0.1.1"),
        (
            [rank(0, "a", "192.168.0.1"), rank(1, "b", "127.0.1.1")],
            "rank 1 its host name, host-b, resolves to 127.0.1.1",
        ),
        ([rank(0, "a", "10.0.0.1"), rank(1, "b", "127.0.1.1")], None),  # rank 0 connects, and can
        ([rank(0, "a", "10.0.0.1"), rank(1, "b", "127.0.0.1"), rank(2, "c", "127.0.0.1")], "host-b"),
        ([rank(0, "a", "127.0.0.1", "lo"), rank(1, "b", "127.0.0.1", "lo")], "GLOO_SOCKET_IFNAME is lo on host-a"),
        ([rank(0, "a", ""), rank(1, "b", "")], None),  # addresses unknown
    ],
)
def test_a_loopback_address_is_an_error_only_where_another_machine_would_connect_to_it(
    ranks: list[RankAddress], named: str | None
) -> None:
    error = unreachable(ranks)
    assert (error is None) == (named is None)
    if error is not None and named is not None:
        assert named in error.message and "GLOO_SOCKET_IFNAME" in error.hint and error.exit_code == EXIT_CONFIG


def all_check(store: dist.Store, ranks: list[RankAddress]) -> list[str]:
    """Runs the check in one thread per rank; returns each rank's error, "" for none."""

    def check(mine: RankAddress) -> str:
        try:
            check_addresses(store, mine, len(ranks), 20.0)
        except SetupError as error:
            return error.message
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(check, ranks))


def test_all_ranks_are_told_the_same_and_what_an_earlier_attempt_left_in_the_store_does_not_count() -> None:
    store = dist.HashStore()
    wrong = [rank(0, "a", "192.168.0.1"), rank(1, "a", "192.168.0.1"), rank(2, "b", "127.0.1.1")]
    told = all_check(store, wrong)
    assert len(set(told)) == 1 and "host-b" in told[0]
    right = [*wrong[:2], rank(2, "b", "192.168.0.2")]
    assert all_check(store, right) == ["", "", ""]
    assert all_check(store, wrong) == told


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(SetupError, match=r"ranks \[1, 2\] did not connect within 0.2 s"):
        check_addresses(dist.HashStore(), rank(0, "a", "10.0.0.1"), 3, 0.2)
    with pytest.raises(SetupError, match="rank 0 did not answer within 0.2 s"):
        check_addresses(dist.HashStore(), rank(1, "a", "10.0.0.1"), 3, 0.2)


def numbered(*places: tuple[str, int], gpus: tuple[str, ...] = ()) -> list[RankAddress]:
    """Ranks 0, 1, ...: the machine and the local rank of each."""
    made = [replace(rank(number, at, "10.0.0.1"), local_rank=local) for number, (at, local) in enumerate(places)]
    return [replace(each, gpu=gpu) for each, gpu in zip(made, gpus or ("",) * len(made), strict=True)]


@pytest.mark.parametrize(
    ("ranks", "wrong"),
    [
        (numbered(("a", 0), ("a", 1), ("b", 0), ("b", 1)), None),
        (numbered(("a", 0), ("a", 1), ("b", 0)), None),
        (numbered(("a", 0), ("b", 1)), None),  # no launcher said the local ranks
        (numbered(("a", 0), ("b", 0), ("a", 1), ("b", 1)), "rank 2 has local rank 1 on host-a, so rank 1 should be"),
        (numbered(("a", 1), ("a", 0)), "rank 0 has local rank 1"),
    ],
)
def test_ranks_that_are_not_numbered_node_by_node_are_refused(ranks: list[RankAddress], wrong: str | None) -> None:
    error = misnumbered(ranks)
    assert (error is None) == (wrong is None)
    if error is not None and wrong is not None:
        assert wrong in error.message and "--map-by slot" in error.hint


def test_two_ranks_with_one_gpu_are_named_to_all_ranks() -> None:
    places = ("a", 0), ("a", 1), ("b", 0), ("b", 1)
    assert shared_gpu(numbered(*places, gpus=("GPU-1", "GPU-2", "GPU-1", "GPU-2"))) == ""
    assert shared_gpu(numbered(*places)) == ""  # the CPU is shared
    shared = numbered(*places, gpus=("GPU-1", "GPU-2", "GPU-3", "GPU-3"))
    store = dist.HashStore()
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda mine: check_addresses(store, mine, 4, 20.0), shared))
    assert set(told) == {"ranks 2 and 3 on host-b would share one GPU, GPU-3"}
