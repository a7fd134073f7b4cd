"""Every kind of mistake in a configuration: named with its place, its source and what to type, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train import registry
from dist_train.config.load import load
from dist_train.errors import EXIT_CONFIG, ConfigError, Problem


def problems(tmp_path: Path, text: str, options: list[str], environ: dict[str, str] | None = None) -> list[Problem]:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, options, environ or {})
    assert caught.value.exit_code == EXIT_CONFIG
    assert len(str(caught.value).splitlines()) >= len(caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        ("trian: {}", "trian", "unknown key", "did you mean train"),
        ("lr: 1", "lr", "unknown key", "did you mean train.optim.lr or qat.optim.lr?"),
        ("train: {lr: 1}", "train.lr", "unknown key", "did you mean train.optim.lr?"),
        (
            "train: {find_unused_parameters: true}",
            "train.find_unused_parameters",
            "unknown key",
            "did you mean find_unused_parameters?",
        ),
        ("qat: {compile: true}", "qat.compile", "unknown key", "did you mean compile?"),
        ("train: {epoch: 1}", "train.epoch", "unknown key", "did you mean train.epochs?"),
        ("batch_size: 1", "batch_size", "unknown key", "batch_size"),
        ("ptq: {zzz: 1}", "ptq.zzz", "unknown key", "known here: samples"),
        ("train: {epochs: ten}", "train.epochs", "must be a whole number, not the text 'ten'", ""),
        ("train: {epochs: 1.5}", "train.epochs", "must be a whole number, not 1.5", ""),
        ("train: {epochs: true}", "train.epochs", "must be a whole number, not true", ""),
        ("train: {epochs: 0}", "train.epochs", "must be greater than 0, not 0", ""),
        ("train: {optim: {lr: '0.1'}}", "train.optim.lr", "must be a number, not the text '0.1'", ""),
        ("train: {optim: {lr: .nan}}", "train.optim.lr", "must be a finite number, not NaN", ""),
        ("train: {optim: {lr: .inf}}", "train.optim.lr", "must be a finite number, not Infinity", ""),
        ("train: {optim: {momentum: 1}}", "train.optim.momentum", "must be less than 1, not 1", ""),
        ("train: {optim: {betas: [1]}}", "train.optim.betas.1", "is missing", ""),
        (
            "train: {optim: {name: LBFGS}}",
            "train.optim.name",
            "'LBFGS' runs forward and backward several times a step",
            "adamw",
        ),
        (
            "qat: {schedule: {name: LambdaLR}}",
            "qat.schedule.name",
            "'LambdaLR' takes a Python function",
            "register_schedule",
        ),
        (
            "train: {optim: {name: adamx}}",
            "train.optim.name",
            "unknown optimizer 'adamx'",
            "did you mean adam",
        ),
        ("train:", "train", "must be a section of settings (key: value), not nothing", ""),
        ("compile: yes", "compile", "must be true or false or 'auto', not the text 'yes'", ""),
        ("run: {name: 5}", "run.name", "must be a text, not 5", ""),
        ("run: {name: a/b}", "run.name", "the text 'a/b' does not match the pattern", ""),
        ("run: {threads_per_rank: x}", "run.threads_per_rank", "must be a whole number or 'auto', not the text", ""),
        ("stages: train", "stages", "must be a list, not the text 'train'", ""),
        ("stages: []", "stages", "must have at least 1 item, not 0", ""),
        ("stages: [train, pqt]", "stages.1", "unknown stage 'pqt'", "ptq"),
        ("model: {name: resnet19}", "model.name", "unknown model 'resnet19'", "resnet18"),
        ("data: {name: digitz}", "data.name", "unknown dataset 'digitz'", "did you mean digits?"),
        ("data: {name: zzz}", "data.name", "unknown dataset 'zzz'", "--import MODULE"),
        ("task: {name: classify}", "task.name", "unknown task 'classify'", "classification"),
        ("strategy: dpp", "strategy", "unknown strategy 'dpp'", "ddp"),
        ("strategy: atuo", "strategy", "unknown strategy 'atuo'", "auto"),
        ("trackers: [jsnl]", "trackers.0", "unknown tracker 'jsnl'", "jsonl"),
        ("qat: {backend: pt2}", "qat.backend", "unknown quantization backend 'pt2'", "pt2e"),
        ("data: {augment: [{name: crop}]}", "data.augment.0.name", "unknown name 'crop'", "random_crop"),
        ("data: {augment: [{p: 1}]}", "data.augment.0", "lacks its name", "random_crop, random_horizontal_flip"),
        ("data: {augment: [crop]}", "data.augment.0", "must be a section of settings", ""),
        (
            "data: {augment: [{name: random_crop, paddin: 1}]}",
            "data.augment.0.paddin",
            "unknown key",
            "did you mean data.augment.0.padding?",
        ),
        ("qat: {rules: [{skip: true}]}", "qat.rules.0.match", "is missing", ""),
        (
            "qat: {rules: [{match: fc, weight: {bit: 4}}]}",
            "qat.rules.0.weight.bit",
            "unknown key",
            "did you mean qat.rules.0.weight.bits?",
        ),
        ("qat: {rules: [{match: fc, weight: {bits: 16}}]}", "qat.rules.0.weight.bits", "must be at most 8, not 16", ""),
        ("qat: {rules: [{match: 3, skip: true}]}", "qat.rules.0.match", "must be a text or a section", ""),
        ("run: {seed: 1}\nrun: {seed: 2}", "run", "is given twice, first at", ""),
        ("run: {seed: 1, seed: 2}", "run.seed", "is given twice, first at", ""),
        ("run: {seed: !!python/name:os.system x}", "run.seed", "cannot have the YAML tag", ""),
        ("run: &a {seed: 1, dir: *a}", "run.dir", "contains itself", ""),
        ("run: {[1]: 2}", "run", "a key must be a single text", ""),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, place: str, message: str, hint: str) -> None:
    found = problems(tmp_path, "# head\n" + text, [])
    assert place in [problem.place for problem in found]
    problem = next(problem for problem in found if problem.place == place)
    assert message in problem.message
    assert hint in problem.hint
    line = 3 if text.count("\n") else 2
    assert problem.source == f"{tmp_path / 'c.yaml'}:{line}"
    assert "Input" not in str(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: b: c", "is not YAML"), ("- train", "must consist of settings"), ("a: 1\n---\nb: 2", "YAML")],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str, message: str) -> None:
    (problem,) = problems(tmp_path, text, [])
    assert message in problem.message and problem.source.startswith(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("options", "place", "message", "source"),
    [
        (["--train.optim.lr"], "--train.optim.lr", "has no value", ""),
        (["--train.optim.lr", "--run.seed", "1"], "--train.optim.lr", "has no value", ""),
        (["train.optim.lr=1"], "train.optim.lr", "is not an option", ""),
        (["--"], "--", "is not an option", ""),
        (["--train..lr", "1"], "--train..lr", "is not a dotted key", ""),
        (["--train.optim.lr", "{"], "train.optim.lr", "is not YAML", "--train.optim.lr"),
        (["--lr", "1"], "lr", "unknown key", "--lr"),
        (["--run.seed", "-1"], "run.seed", "must be at least 0, not -1", "--run.seed"),
        (["--strategy.name", "ddp"], "strategy.name", "strategy is the single value auto", "--strategy.name"),
        (["--data.augment.1.p", "1"], "data.augment.1.p", "data.augment has 1 item", "--data.augment.1.p"),
        (["--data.augment.p", "1"], "data.augment.p", "name an item by its number", "--data.augment.p"),
        (["--stages.9", "train"], "stages.9", "stages has 5 items", "--stages.9"),
        (["--run.seed", "7 # lucky"], "run.seed", "would drop '# lucky' as a comment", "--run.seed"),
        (["--data.args.root", "/a/run #2"], "data.args.root", "would drop '#2' as a comment", "--data.args.root"),
        (["--data.args.root", "#2"], "data.args.root", "would drop '#2' as a comment", "--data.args.root"),
        (["--data.args.a", "b: 1 # c\nd: 2"], "data.args.a", "would drop '# c' as a comment", "--data.args.a"),
        (["--stages", "[train] #, qat]"], "stages", "would drop '#, qat]' as a comment", "--stages"),
        (["--run.dir", "a\udcff"], "run.dir", r"'a\udcff' is not UTF-8", "--run.dir"),
    ],
)
def test_a_mistake_in_an_option_is_named(
    tmp_path: Path, options: list[str], place: str, message: str, source: str
) -> None:
    text = "strategy: auto\ndata: {augment: [{name: random_horizontal_flip}]}"
    (problem,) = problems(tmp_path, text, options)
    assert (problem.place, problem.source) == (place, source)
    assert message in problem.message


def test_a_missing_file_is_named_with_a_near_one_and_the_options_are_still_judged(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "quik.yaml", ["--train.epochs", "0"], {})
    missing, epochs = caught.value.problems
    assert missing.hint == f"did you mean {tmp_path / 'quick.yaml'}?"
    assert epochs.place == "train.epochs"


EVERYTHING = """\
run: {seed: -1}
data:
  name: nothing_like_it
  global_batch_size: 8
  micro_batch_size: 9
  root: not/there
  augment: [{name: crop}, {name: color_jitter}]
model: {name: resnet5}
stages: [train, pqt, export, train]
train: {optim: {name: adamw, nesterov: true, lr: fast}, schedule: {name: step, final: 0.5}}
qat: {backend: fbgemm, optim: {nesterov: true, momentum: 0, lrr: 1}}
export: {formats: []}
trackers: [jsonl, jsonl]
"""


def test_all_mistakes_and_contradictions_are_reported_at_once(tmp_path: Path) -> None:
    environ = {"RANK": "2", "WORLD_SIZE": "2"}
    options = ["--strategy", "single", "--import", "not_there_at_all", "--y"]
    found = problems(tmp_path, EVERYTHING, options, environ)
    assert sorted(problem.place for problem in found) == sorted(
        [
            *("--y", "not_there_at_all", "run.seed", "data.name", "data.augment.0.name", "model.name", "stages.1"),
            *("train.optim.lr", "qat.backend", "qat.optim.lrr", "export.formats"),
            *("data.micro_batch_size", "data.root", "data.augment", "stages", "trackers", "strategy", "RANK"),
            *("train.optim.nesterov", "train.schedule.final", "qat.optim.nesterov"),
        ]
    )


def test_no_contradiction_is_made_of_a_value_that_was_never_given(tmp_path: Path) -> None:
    found = problems(tmp_path, "data: {global_batch_size: x, micro_batch_size: 100}\nstages: [traim, convert]", [])
    assert {problem.place for problem in found} == {"data.global_batch_size", "stages.0"}


def test_a_stage_whose_package_is_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.stages._entries, "broken", registry.Entry("no_such_module_at_all:Stage"))
    (problem,) = problems(tmp_path, "stages: [broken]", [])
    assert "no_such_module_at_all" in problem.message


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"run: {name: \xff\xfe\x00}")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(tmp_path / "c.yaml", environ={})


def test_a_list_that_only_became_empty_is_no_second_mistake(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "stages: [traim]", [])
    assert problem.place == "stages.0"
