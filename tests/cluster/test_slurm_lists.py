"""Slurm's short forms, read as Slurm reads them."""

from __future__ import annotations

import pytest

from dist_train.cluster.slurm_lists import parse_hostlist, parse_tasks_per_node, show_hostnames

LISTS = {
    "gpu[01-03,7],login1": ["gpu01", "gpu02", "gpu03", "gpu7", "login1"],
    "n1": ["n1"],
    "n[9-11]": ["n9", "n10", "n11"],
    "n[008-010]": ["n008", "n009", "n010"],
    "r[1-2]n[01-02]": ["r1n01", "r1n02", "r2n01", "r2n02"],
    "n[1-2]-ib,a.b.c": ["n1-ib", "n2-ib", "a.b.c"],
    "127.0.0.[1-2]": ["127.0.0.1", "127.0.0.2"],
    "b,a,b2": ["b", "a", "b2"],
}


@pytest.mark.parametrize("text", LISTS)
def test_a_host_list_is_expanded_in_its_order(text: str) -> None:
    assert parse_hostlist(text) == LISTS[text]


def test_without_slurm_s_programs_the_list_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert show_hostnames("n[1-2],m") == ["n1", "n2", "m"]


@pytest.mark.parametrize("text", ["", "n[1-2", "n1-2]", "n[2-1]", "n[a-b]", "n1,,n2", "n1,", ",n1", "n[]"])
def test_what_is_no_host_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="list|range"):
        parse_hostlist(text)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("2(x3),1", [2, 2, 2, 1]), ("1", [1]), ("4,2(x2)", [4, 2, 2]), ("10(x2),3,1(x1)", [10, 10, 3, 1])],
)
def test_tasks_per_node(text: str, tasks: list[int]) -> None:
    assert parse_tasks_per_node(text) == tasks


@pytest.mark.parametrize("text", ["", "2(x", "x3", "2,", "0", "2(x0)", "-1", "2x3"])
def test_what_is_no_list_of_tasks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tasks per node"):
        parse_tasks_per_node(text)
