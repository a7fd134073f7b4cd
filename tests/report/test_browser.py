"""The page in a real browser: no error on its console, nothing asked of any network, its switches work."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from dist_train.report.write import write_report
from tests.support.written_run_dirs import finished, started

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome: apt-get install chromium"),
]


def load(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's markup after its scripts ran, and what its console says; what the page may not load is said there."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as browser:
        try:
            markup, errors = browser.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(browser.pid, signal.SIGKILL)
            raise
    assert browser.returncode == 0, errors
    return markup, [line for line in errors.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    paths = [finished(folder / "a", "first"), started(folder / "second", "failed", "OSError: <disk> full")]
    return write_report(paths, folder / "out")


@pytest.fixture
def page(written: Path, tmp_path: Path) -> Path:
    """A copy, alone in its folder."""
    return Path(shutil.copy(written, tmp_path))


def test_the_page_loads_without_a_word_on_the_console(page: Path, tmp_path: Path) -> None:
    markup, console = load(page, tmp_path / "profile")
    assert console == []
    assert "Curves: train" in markup and markup.count("<svg") == 8


@pytest.mark.parametrize(
    "planted",
    [
        "<script>undefinedFunction()</script>",
        '<img src="http://127.0.0.1:9/x.png">',
        "<script>fetch('x.json')</script>",
    ],
)
def test_an_error_and_a_request_would_be_seen(planted: str, page: Path, tmp_path: Path) -> None:
    page.write_text(page.read_text().replace("</main>", f"{planted}</main>"))
    _, console = load(page, tmp_path / "profile")
    assert re.search(r"not defined|Content Security Policy", " ".join(console))


def test_a_run_s_chip_hides_its_curves(page: Path, tmp_path: Path) -> None:
    click = "<script>document.querySelector('button[data-run=\"1\"]').click()</script>"
    page.write_text(page.read_text().replace("</body>", f"{click}</body>"))
    markup, console = load(page, tmp_path / "profile")
    assert console == []
    hidden = re.findall(r'id="(run\d+-[^"]*)" style="display: none;?"', markup)
    assert hidden and all(each.startswith("run1-") for each in hidden)
