"""dist-train report: what it writes, and what it never overwrites."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_train.cli import main
from dist_train.errors import RunDirError
from dist_train.report.write import write_report
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir
from tests.support.written_run_dirs import PNG, details, finished, line, started

pytestmark = pytest.mark.heavy


class Texts(HTMLParser):
    """The texts of a page, and its elements that may load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def __contains__(self, text: str) -> bool:
        return any(text in each for each in self.texts)


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_a_finished_run_has_a_page_with_plots_and_tables_beside_it(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    page = write_report([run])
    assert page == run / "report" / "report.html"
    shown = Texts(page.read_text())
    for text in ("first", "done", "90.00 %", "0.995", "not finite", "failed", "dog", "loss 2.5, id 17", "small_resnet"):
        assert text in shown, text
    assert shown.tags.count("svg") == len(list((run / "report" / "plots").glob("[tq]*.png"))) == 8
    for plot in (run / "report" / "plots").glob("*.png"):
        assert Image.open(plot).size[0] > 300
    for text in ("62.3 % of the weights", "floating point: lstm, up", "lowered skipped", "onnxscript not installed"):
        assert text in shown, text
    tables = run / "report" / "tables"
    assert rows(tables / "gates_skipped.csv")[1:] == [["first", "lowered", "onnxscript not installed"]]
    assert rows(tables / "curves.csv")[:2] == [
        ["run", "stage", "epoch", "step", "attempt", "name", "value"],
        ["first", "train", "0", "0", "0", "loss", "1.0"],
    ]
    assert ["first", "int8", "latency_ms.1", "0.25"] in rows(tables / "results.csv")
    assert ["first", "artifact", "", "1e-05", "False"] in rows(tables / "gates.csv")
    assert rows(tables / "confusion-fp32.csv")[1] == ["cat", "9", "1", "1"]
    assert rows(tables / "per_class.csv")[2] == ["dog", "1.0", "1.0"]
    assert rows(tables / "worst-int8.csv")[1] == ["17", "2.5", "cat", "<b>bird</b>"]


def test_the_page_is_one_file(tmp_path: Path) -> None:
    page = write_report([finished(tmp_path / "run")]).read_text()
    assert PNG in page
    loads = Texts(page).loads
    assert loads and all(each.startswith(("data:", "#")) for each in loads)
    assert not re.search(r"url\((?!#)|@import", page)


def test_what_comes_from_a_run_is_text_and_not_markup(tmp_path: Path) -> None:
    evil = '<script>alert("&1")</script>$x_1$'
    run = RunDir(finished(tmp_path / "run", name=evil))
    replace_json(run.details("fp32"), details([evil, "b", "c"]))
    replace_json(run.status, {"state": "failed", "stage": evil, "step": 1, "restarts": 0, "error": evil})
    shown = Texts(write_report([run.path, finished(tmp_path / "other")], tmp_path / "out").read_text())
    assert shown.tags.count("script") == 1 and evil in shown


def test_escapes_and_formulas_of_a_run_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202egnp"
    run = RunDir(finished(tmp_path / "run", name="=1+1"))
    replace_json(run.details("fp32"), details([evil, '=HYPERLINK("http://a")', "-1"]))
    page = write_report([run.path], tmp_path / "out").read_text()
    assert r"\x1b[2J\u202egnp" in page and "\x1b" not in page and "\u202e" not in page
    cells = [row[0] for row in rows(tmp_path / "out" / "tables" / "confusion-fp32.csv")]
    assert cells[1:] == [r"\x1b[2J\u202egnp", '\'=HYPERLINK("http://a")', "-1"]
    assert rows(tmp_path / "out" / "tables" / "curves.csv")[1][0] == "'=1+1"


def test_a_run_of_classes_that_are_no_utf8_has_a_page(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    run = RunDir(finished(tmp_path / latin, name=latin))
    replace_json(run.details("fp32"), details([latin, "b", "c"]))
    page = write_report([run.path], tmp_path / "out")
    assert r"caf\xe9" in Texts(page.read_text(encoding="utf-8"))


def test_what_comes_from_a_run_cannot_leave_an_attribute(tmp_path: Path) -> None:
    evil = """x" onclick="alert(1)' onclick='alert(2)"""
    run = RunDir(finished(tmp_path / "run", name=evil, lines=[line("train", 0, loss=1.0, **{evil: 1.0})]))
    found = details([evil, "b", "c"])
    replace_json(run.details("fp32"), {**found, "worst": [{**found["worst"][0], "id": evil, "image": evil}]})
    replace_json(run.status, {"state": evil, "stage": evil, "step": 1, "restarts": 0, "error": None})
    shown = Texts(write_report([run.path, finished(tmp_path / "other")], tmp_path / "out").read_text())
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    for name, value in (
        ("alt", f"sample {evil}"),
        ("src", f"data:image/png;base64,{evil}"),
        ("title", f"{evil} taken for b: 1"),
        ("aria-label", f"train: {evil}"),
    ):
        assert (name, value) in shown.attributes, name


@pytest.mark.parametrize(("state", "error"), [("running", None), ("failed", "NonFiniteLossError: <rank 1>")])
def test_a_run_that_is_not_finished_shows_its_state_and_what_is_there(
    tmp_path: Path, state: str, error: str | None
) -> None:
    shown = Texts(write_report([started(tmp_path / "run", state, error)]).read_text())
    assert state in shown and "No model is finished yet." in shown and (error is None or error in shown)
    assert shown.tags.count("svg") == 1


def test_a_run_without_a_single_line_has_a_page(tmp_path: Path) -> None:
    run = RunDir(started(tmp_path / "run"))
    run.metrics.unlink()
    run.status.unlink()
    assert "unknown" in Texts(write_report([run.path]).read_text())


def test_several_runs_share_a_page_with_the_settings_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [finished(tmp_path / "a", "first"), started(tmp_path / "second")]
    monkeypatch.chdir(tmp_path)
    page = write_report(paths)
    assert page == Path("report/report.html")
    text = page.read_text()
    assert 'id="run0-train_loss-0"' in text and 'id="run1-train_loss-2"' in text
    assert "run.name" in Texts(text) and "data.name" in Texts(text)
    assert {row[0] for row in rows(Path("report/tables/curves.csv"))} == {"run", "first", "second"}


@pytest.mark.heavy
def test_many_classes_are_an_image_and_the_pairs_most_confused(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    for model in ("fp32", "int8"):
        replace_json(run.details(model), details([f"class {number}" for number in range(60)]))
    shown = Texts(write_report([run.path]).read_text())
    assert "The 40 worst of 60 classes" in " ".join(shown.texts)
    assert "of the class" in shown


def thousand(wrong: int = 1_500) -> dict[str, Any]:
    """Returns the details of a model with 1,000 classes, which lists 1,000 of its pairs, `wrong` of them all."""
    pairs = [[number, (number + 1) % 1000, 3 if number == 7 else 1, 50] for number in (7, *range(7), *range(8, 1000))]
    found = details([f"class {number}" for number in range(1000)])
    counts = {"num_pairs": wrong - 2, "num_wrong": wrong, "num_samples": 50_000}
    return {**found, "metrics": {"confused_pairs": pairs, **counts, "per_class": [0.98] * 1000}}


def test_a_thousand_classes_are_the_worst_pairs_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    run.details("int8").unlink()
    replace_json(run.details("fp32"), thousand())
    page = write_report([run.path])
    shown = Texts(page.read_text())
    for text in ("1500 of 50000 wrong", "6.0 %", "(1458 other pairs)", "No confusion matrix of 1000 classes"):
        assert text in shown, text
    assert "The 40 worst of 1000 classes, by fp32." in shown
    assert "class 0" in shown and "class 999" in shown, "a sample's target and decision go by their names"
    assert "Confusion matrix" not in shown and not list(page.parent.glob("plots/confusion-*"))
    written = rows(page.parent / "tables" / "confused-fp32.csv")
    assert written[:3] == [
        ["target", "decision", "samples", "of the class"],
        ["class 7", "class 8", "3", "0.06"],
        ["class 0", "class 1", "1", "0.02"],
    ]
    assert written[-1] == ["(498 other pairs)", "(498 other pairs)", "498", ""]
    assert len(written) == 1002 and sum(int(row[2]) for row in written[1:]) == 1500
    assert not (page.parent / "tables" / "confusion-fp32.csv").exists()
    assert page.stat().st_size < 200_000


def test_a_whole_matrix_of_many_classes_is_shown_by_its_worst_pairs_too(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    run.details("int8").unlink()
    replace_json(run.details("fp32"), details([f"class {number}" for number in range(300)]))
    page = write_report([run.path])
    shown = Texts(page.read_text())
    assert "299 of 2999 wrong" in shown and "(259 other pairs)" in shown and "Confusion matrix" not in shown
    assert [path.name for path in page.parent.glob("*/conf*")] == ["confused-fp32.csv"]
    assert len(rows(page.parent / "tables" / "confused-fp32.csv")) == 300


def test_a_model_of_many_classes_without_mistakes_has_no_pairs(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    perfect = thousand(wrong=2)
    replace_json(
        run.details("fp32"), {**perfect, "metrics": {**perfect["metrics"], "confused_pairs": [], "num_wrong": 0}}
    )
    shown = Texts(write_report([run.path]).read_text())
    assert "0 of 50000 wrong" in shown and "of the class" not in shown


def test_a_task_without_classes_has_no_confusion(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    for model in ("fp32", "int8"):
        sample = {"id": 1, "loss": 0.25, "target": 1.5, "decision": [0.125, 2.0], "image": None}
        replace_json(run.details(model), {"model": model, "classes": [], "metrics": {"r": 0.5}, "worst": [sample]})
    shown = Texts(write_report([run.path]).read_text())
    assert "Confusion matrix" not in shown and "Accuracy per class" not in shown
    assert "0.125, 2" in shown and "loss 0.25, id 1" in shown


@pytest.mark.heavy
def test_a_report_is_written_anew_over_an_earlier_one_and_stale_files_go(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    write_report([run.path])
    run.details("int8").unlink()
    (run.report / "mine.txt").write_text("kept")
    write_report([run.path])
    assert not (run.report / "plots" / "confusion-int8.png").exists()
    assert (run.report / "plots" / "confusion-fp32.png").exists()
    assert (run.report / "mine.txt").read_text() == "kept"


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("years of work")
    with pytest.raises(RunDirError, match=r"report.html was not written by dist-train report"):
        write_report([finished(tmp_path / "run")], out)
    assert [entry.name for entry in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "years of work"


@pytest.mark.heavy
def test_the_command_takes_runs_and_an_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, out = finished(tmp_path / "a", "x"), finished(tmp_path / "b", "y"), tmp_path / "deep" / "out"
    assert main(["report", str(first), str(second), f"--output={out}"]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert main(["report", str(first), "--output", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(first), "--output=--odd"]) == 0 and (tmp_path / "--odd" / "report.html").is_file()
    for arguments, message in (
        ([], "report: missing argument 'RUN_DIR"),
        ([str(tmp_path)], "has no config.yaml"),
        ([str(first), "--output"], "--output has no value"),
        ([str(first), "--output", "--open"], "--output has no value"),
        ([str(first), "--open"], "report has no option --open"),
    ):
        assert main(["report", *arguments]) == 78
        assert message in capsys.readouterr().err


@pytest.mark.heavy
def test_a_report_does_not_import_torch(tmp_path: Path) -> None:
    code = "import sys; from dist_train.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code, "report", str(finished(tmp_path / "run"))], timeout=100, capture_output=True
    )
    assert answer.returncode == 0, answer.stderr
