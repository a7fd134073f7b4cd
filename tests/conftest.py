"""Marks the quick tests, skips those for GPUs, and fails other skips if DIST_TRAIN_REQUIRE_ALL=1.

That variable, which CI sets, means that everything a test can need is installed. CI also has a limit of time, and
machines differ by a factor of three: `--minutes M --order SEED` draws the order of the files, and leaves out what has
not begun after M minutes. Another seed so reaches other tests.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from typing import Any

import pytest

from tests.support.torch_settings import own_torch_settings

# Compiled kernels of this run alone: those of another checkout or another process at work must not be loaded.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

REQUIRE_ALL = os.environ.get("DIST_TRAIN_REQUIRE_ALL") == "1"
BEGAN = time.monotonic()
NOT_QUICK = {"slow", "long", "gpu", "heavy"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="leave out tests that have not begun after as many minutes")
    parser.addoption("--order", help="draw the order of the test files by this seed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks a test quick unless it is in an *_integration.py, or marked slow, long, gpu or heavy."""
    if config.getoption("--order") is not None:
        files = sorted({str(item.path) for item in items})
        random.Random(config.getoption("--order")).shuffle(files)
        items.sort(key=lambda item: files.index(str(item.path)))
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "gpu" in marks:
            item.add_marker(pytest.mark.skipif(not _gpu(), reason="only on a machine with CUDA devices"))
        if not marks & NOT_QUICK and not item.path.stem.endswith("_integration"):
            item.add_marker(pytest.mark.quick)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """A run sets threads and determinism for its process: the next test has torch as this one, its fixtures too."""
    with own_torch_settings():
        return (yield)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A skip whose reason does not start with "only" (only without a library, only on a GPU) becomes a failure."""
    report = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = (
            report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        )
        if not reason.startswith("only "):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, and DIST_TRAIN_REQUIRE_ALL=1 forbids it: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A file that imports a backend which refuses the installed torch or torchao is skipped as a whole."""
    report = yield
    if report.failed and not REQUIRE_ALL and report.call.excinfo.typename == "BackendVersionError":
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {report.call.excinfo.value}")
    return report


_started: list[str] = []


def _note_rank(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "tests.rank":  # raised by tests/support/ranks.py
        _started.append(str(arguments[0]))


sys.addaudithook(_note_rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _started.clear()
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"only what begins within {minutes:g} minutes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A quick test that starts ranks fails."""
    result = yield
    if _started and item.get_closest_marker("quick") is not None:
        pytest.fail(f"a quick test started ranks {', '.join(_started)}: mark it heavy", pytrace=False)
    return result
