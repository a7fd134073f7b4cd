"""The tables of all settings."""

from __future__ import annotations

import re

import pytest

from dist_train.cli import main
from dist_train.config.base import Settings
from dist_train.config.reference import reference
from dist_train.config.tree import Config, leaves


def _tables() -> dict[str, dict[str, list[str]]]:
    """Section -> key -> the other cells."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in reference().splitlines():
        if line.startswith("## "):
            rows = tables[line.removeprefix("## ").strip("`")] = {}
        elif line.startswith("| `"):
            key, *cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
            assert key.strip("`") not in rows and len(cells) == 4, line
            rows[key.strip("`")] = cells
    return tables


def test_every_setting_has_a_row_that_says_whether_it_may_change_on_resume() -> None:
    tables = _tables()
    for dotted, _, determines_result in leaves(Config()):
        section, _, key = dotted.rpartition(".") if dotted.count(".") == 0 else dotted.partition(".")
        table = tables[section or "At the top"] if section != "profile" else {}
        if not section and key == "profile":
            continue  # a section that may be left out
        row = table.get(key) or (tables["train"].get(key) if section == "qat" else None)
        assert row is not None, dotted
        assert row[2] == ("fixed" if determines_result else "may change"), dotted


def test_types_bounds_and_defaults_are_told() -> None:
    tables = _tables()
    assert tables["train"]["optim.lr"][:2] == ["float > 0", "`0.1`"]
    assert tables["data"]["workers"][:3] == ["int ≥ 0 ≤ 1024 or `auto`", "`auto`", "may change"]
    assert tables["run"]["device"][0] == "`auto`, `cpu`, `cuda`"
    assert tables["train"]["early_stopping.patience"][1] == "required"
    assert tables["profile"]["steps"][:2] == ["2 int ≥ 0", "required"]
    assert tables["data"]["augment[random_crop].padding"][0] == "int ≥ 1 ≤ 65536"
    assert "`random_crop`" in tables["data"]["augment"][0]


def test_qat_lists_what_differs_from_train_only() -> None:
    qat = _tables()["qat"]
    assert qat["optim.lr"][1] == "`0.001`" and qat["epochs"][1] == "`2`" and "freeze_ranges" in qat
    assert "optim.momentum" not in qat and "clip_grad_norm" not in qat


def test_meanings_are_those_of_the_docstrings_in_one_line() -> None:
    data = Config.model_fields["data"].annotation
    meaning = data.model_fields["global_batch_size"].description  # type: ignore[union-attr]
    assert _tables()["data"]["global_batch_size"][3] == meaning


def test_a_third_partys_stage_has_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train import registry
    from dist_train.registry import Entry

    class Prune(Settings):
        share: float = 0.5
        """Weights | channels to remove."""

    monkeypatch.setattr(
        registry.stages, "_entries", {**registry.stages._entries, "prune": Entry("json:loads", settings=Prune)}
    )
    assert _tables()["prune"]["share"] == ["float", "`0.5`", "fixed", r"Weights \| channels to remove."]


def test_the_command_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "reference"]) == 0
    assert capsys.readouterr().out == reference()
