"""Settings of torch that one test changes are not there in the next one."""

from __future__ import annotations

import torch

from tests.support.torch_settings import own_torch_settings


def _settings() -> tuple[bool, bool, bool, int]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_num_threads(),
    )


def _change() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(torch.get_num_threads() + 1)


def test_settings_are_restored() -> None:
    before = _settings()
    with own_torch_settings():
        _change()
        assert _settings() != before
    assert _settings() == before


_seen: list[tuple[bool, bool, bool, int]] = []


def test_a_test_may_change_them() -> None:
    _seen.append(_settings())
    _change()


def test_the_next_one_does_not_see_it() -> None:
    assert not _seen or _settings() == _seen[0], "_seen is empty where this test runs alone"
