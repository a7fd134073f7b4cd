"""The README and the pages keep their sizes, and name only files, settings and commands that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_train
from dist_train.config.reference import reference
from tests.support.pages import DOCS, PAGES, README, blocks
from tests.support.ranks import ROOT

ALL = [README, ROOT / "CONTRIBUTING.md", *PAGES]
FOLDERS = "dist_train|tests|configs|benchmarks|launch|docs"


def _name(page: Path) -> str:
    return page.name


def test_the_readme_is_a_screen_or_two() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 100]


def test_there_are_two_set_up_commands_each_one_line() -> None:
    commands = [line for line in README.read_text().splitlines() if line.startswith("pip install")]
    assert len(commands) == 2
    assert commands[0].endswith("torchrun --nproc_per_node 2 -m dist_train run quickstart")
    assert commands[1].endswith("pytest")
    assert commands[0] in blocks(DOCS / "quickstart.md")[0]


def test_the_readme_shows_the_figures_of_the_quickstart_page() -> None:
    table = next(block for block in blocks(README) if "┏" in block)
    assert table in (DOCS / "quickstart.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_page_is_at_most_250_lines(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 250


def test_the_generated_parts_are_current() -> None:
    # A process of its own: what other tests register must not be listed.
    command = [sys.executable, "docs/generate.py", "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr


def _links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    yield from re.findall(r'src="([^"]+)"', text)


@pytest.mark.parametrize("page", ALL, ids=_name)
def test_links_lead_to_files(page: Path) -> None:
    local = [link for link in _links(page) if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", ALL, ids=_name)
def test_paths_are_there(page: Path) -> None:
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w/.-]*)`", page.read_text())) - {"docs/_build"}
    if page.name == "flows.md":
        local = re.findall(rf"`(?!(?:{FOLDERS})/)(\w+/[\w/]*(?:\.py)?)`", page.read_text())
        named |= {f"dist_train/{name}" for name in local}
        assert len(named) > 30
    assert not [name for name in named if "NAME" not in name and not (ROOT / name).exists()]


def test_each_feature_names_a_test_that_is_there() -> None:
    rows = [line for line in (DOCS / "features.md").read_text().splitlines() if line.startswith("|")]
    features = [row for row in rows if not row.startswith(("|---", "| Feature"))]
    assert len(features) > 40
    for row in features:
        named = re.findall(rf"`((?:{FOLDERS})/[\w/.]+)`", row.partition(" | ")[2])
        assert named, row
        assert not [name for name in named if not (ROOT / name).is_file()], row


def test_the_settings_that_are_named_exist() -> None:
    section, known = "", set()
    for line in reference().splitlines():
        if line.startswith("## "):
            section = "" if line == "## At the top" else line.removeprefix("## ").strip("`") + "."
        elif line.startswith("| `"):
            known.add(section + re.sub(r"\[.*?\]", "", line.split("`")[1]))
    known |= {key.replace("train.", "qat.", 1) for key in known if key.startswith("train.")}
    known |= {key.rpartition(".")[0] for key in known}
    known.add("train.optim.rl")  # the mistake that a page shows
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    for page in ALL:
        named = set(re.findall(rf"[`-]((?:{sections})(?:\.[a-z]\w*)+)(?=[`: ])", page.read_text()))
        named -= {name for name in named if re.match(r"(data|model|task)\.args\.", name)}  # the part's own
        unknown = {name for name in named - known if not name.endswith((".py", ".json", ".yaml", ".pt2", ".ts"))}
        assert not unknown, page.name


def test_yaml_of_the_quantization_page_is_a_configuration(tmp_path: Path) -> None:
    printed = blocks(DOCS / "quantization.md", "yaml")
    assert len(printed) == 2
    for text in printed:
        (tmp_path / "printed.yaml").write_text(text)
        assert dist_train.load_config(tmp_path / "printed.yaml").stages == ["train", "ptq", "qat", "convert", "export"]


@pytest.mark.parametrize("page", ALL, ids=_name)
def test_python_on_a_page_is_python(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_the_commands_that_are_named_exist() -> None:
    answer = subprocess.run([sys.executable, "-m", "dist_train", "--help"], capture_output=True, text=True, timeout=60)
    verbs = set(re.findall(r"^ {2}(\w+) ", answer.stdout, re.MULTILINE))
    for page in ALL:
        named = set(re.findall(r"dist-train ([a-z]\w+)", page.read_text()))
        assert not named - verbs, page.name


def test_the_api_page_lists_what_the_package_exports() -> None:
    page = (DOCS / "api.md").read_text()
    listed = re.findall(r"^\.\. (?:auto\w+|py:\w+):: (\w+)", page, re.MULTILINE)
    assert sorted(listed) == sorted(dist_train.__all__)
    assert all(hasattr(dist_train, name) for name in listed)
