"""Reading a configuration: values, their sources, options, and what differs from a recorded one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import dist_train
from dist_train import registry
from dist_train.config.load import annotated, differences, dump, load
from dist_train.config.shipped import shipped
from dist_train.config.tree import Config, leaves
from dist_train.errors import ConfigError

QUICK = """\
# A quick one
run: {name: quick, seed: 3}
data:
  global_batch_size: 32
  augment:
    - {name: random_crop, padding: 1}
    - name: random_horizontal_flip
train:
  epochs: 3
  optim: {lr: 1e-3}
"""


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory for modules of the user; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    for names in (registry.models, registry.stages):
        monkeypatch.setattr(names, "_entries", dict(names._entries))
    return tmp_path


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    file = tmp_path / "quick.yaml"
    file.write_text(QUICK)
    return file


def test_values_come_from_the_file_and_the_rest_are_defaults(quick: Path) -> None:
    config = load(quick, environ={}).config
    assert (config.run.seed, config.train.epochs, config.data.global_batch_size) == (3, 3, 32)
    assert config.train.optim.lr == 0.001
    assert config.qat == Config().qat


def test_every_setting_has_a_source(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quick.parent)
    loaded = load("quick.yaml", ["--train.optim.lr", "0.5", "--data.augment.0.padding=2", "--fast-dev-run"], {})
    assert loaded.sources["run.seed"] == "quick.yaml:2"
    assert loaded.sources["data.global_batch_size"] == "quick.yaml:4"
    assert loaded.sources["train.epochs"] == "quick.yaml:9"
    assert loaded.sources["train.optim.lr"] == "--train.optim.lr"
    assert loaded.sources["data.augment"] == "quick.yaml:5, --data.augment.0.padding"
    assert loaded.sources["debug.fast_dev_run"] == "--debug.fast_dev_run"
    assert loaded.sources["qat.epochs"] == "default"
    assert set(loaded.sources) == {key for key, _, _ in leaves(loaded.config)}


def test_annotated_yaml_reads_back_as_the_same_configuration(quick: Path, tmp_path: Path) -> None:
    loaded = load(quick, ["--model.args.note", '"a # b: it\'s"'], {})
    text = annotated(loaded)
    assert "--model.args.note" in text and f"{quick}:9" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load(tmp_path / "again.yaml", environ={}).config == loaded.config


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--train.optim.lr", "1e-3"], "train.optim.lr", 1e-3),
        (["--train.optim.lr=5E-2"], "train.optim.lr", 0.05),
        (["--train.optim.lr", "1"], "train.optim.lr", 1.0),
        (["--train.optim.lr", "1", "--train.optim.lr", "2"], "train.optim.lr", 2.0),
        (["--train.optim", "{name: adamw}"], "train.optim.name", "adamw"),
        (["--train.optim", "{name: adamw}"], "train.optim.lr", 0.1),
        (["--stages", "[train]"], "stages", ["train"]),
        (["--data.args.label", "no"], "data.args", {"label": "no"}),
        (["--data.args.a.b", "0x10"], "data.args", {"a": {"b": 16}}),
        (["--data.args.date", "2020-01-01"], "data.args", {"date": "2020-01-01"}),
        (["--data.args.x", "-.inf"], "data.args", {"x": float("-inf")}),
        (["--data.args.text", "'1e-3'"], "data.args", {"text": "1e-3"}),
        (["--data.args.empty", ""], "data.args", {"empty": None}),
        (["--data.micro_batch_size", "null"], "data.micro_batch_size", None),
        (["--debug.ledger", "true"], "debug.ledger", True),
        (["--export.latency_batch_sizes.1", "64"], "export.latency_batch_sizes", [1, 64]),
        (["--run.dir=a/b=c"], "run.dir", "a/b=c"),
    ],
)
def test_options_are_yaml_1_2_values(quick: Path, options: list[str], key: str, value: object) -> None:
    found = {name: (given, type(given)) for name, given, _ in leaves(load(quick, options, {}).config)}
    assert found[key] == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "sweep #2", "#2", "a: b", "007", "1e3", "yes", "true", "~", "Null", "0x10", "[a]", "{a: b}", "*a", "&a b",
        "!!int 5", "| a", " a ", "it's", '"a" and "b"', "$HOME", "a\tb", "naïve ü", "2020-01-01", "a\\b", "%41", "-",
    ],
)  # fmt: skip
def test_a_path_or_a_name_is_the_text_as_typed(quick: Path, text: str) -> None:
    options = [f"--run.dir={text}", f"--wandb.project={text}", f"--wandb.entity={text}", f"--log.epoch_format={text}"]
    config = load(quick, [*options, "--wandb.tags", "[a, b]", f"--wandb.tags.1={text}"], {}).config
    assert config.run.dir == Path(text)
    assert [config.wandb.project, config.wandb.entity, config.log.epoch_format] == [text] * 3
    assert config.wandb.tags == ["a", text]


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--run.dir", "null"], "run.dir", None),
        (["--run.dir", ""], "run.dir", None),
        (["--run.dir", '"null"'], "run.dir", "null"),
        (["--run.name", "null"], "run.name", "null"),
        (["--wandb.project", "''"], "wandb.project", ""),
        (["--log.epoch_format", "'{epoch}: it''s'"], "log.epoch_format", "{epoch}: it's"),
        (["--log.epoch_format", "Epoch: {top1:.1%} #"], "log.epoch_format", "Epoch: {top1:.1%} #"),
        (["--run.threads_per_rank", "2"], "run.threads_per_rank", 2),
        (["--run.threads_per_rank", "auto"], "run.threads_per_rank", "auto"),
        (["--data.args.text", "'a # b'"], "data.args", {"text": "a # b"}),
        (["--data.args.text", "a#b"], "data.args", {"text": "a#b"}),
        (["--export.models", "null"], "export.models", None),
    ],
)
def test_null_and_quotes_keep_their_meaning(quick: Path, options: list[str], key: str, value: object) -> None:
    assert {name: given for name, given, _ in leaves(load(quick, options, {}).config)}[key] == value


@pytest.mark.parametrize(
    ("text", "match"),
    [("*.conv #2", "*.conv #2"), ("null", "null"), ("{type: Conv2d}", {"type": "Conv2d"}), ("type: A", {"type": "A"})],
)
def test_a_text_or_a_section_is_a_section_only_where_yaml_reads_one(quick: Path, text: str, match: object) -> None:
    options = ["--qat.rules", "[{match: a, skip: true}]", "--qat.rules.0.match", text]
    assert load(quick, options, {}).config.model_dump()["qat"]["rules"][0]["match"] == match


def test_a_path_that_no_shell_expanded_is_warned_of(quick: Path) -> None:
    warned = {warning.place for warning in load(quick, ["--run.dir=~/a", "--data.cache_dir=$SCRATCH/b"], {}).warnings}
    assert warned == {"run.dir", "data.cache_dir"}
    assert load(quick, ["--run.dir=a~/$b"], {}).warnings == ()


def test_an_item_of_a_list_is_addressed_by_its_number(quick: Path) -> None:
    config = load(quick, ["--data.augment.1.p", "0.25"], {}).config
    assert config.model_dump()["data"]["augment"] == [
        {"name": "random_crop", "padding": 1},
        {"name": "random_horizontal_flip", "p": 0.25},
    ]


def test_a_partial_qat_optimiser_keeps_its_own_default_learning_rate(quick: Path) -> None:
    assert load(quick, ["--qat.optim.momentum", "0.8"], {}).config.qat.optim.lr == 0.001


def test_a_shipped_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text("# Small\nrun: {name: small}\n")
    monkeypatch.setattr("dist_train.config.shipped.configs_dir", lambda: tmp_path)
    assert shipped() == {"small": tmp_path / "small.yaml"}
    assert load("small", environ={}).config.run.name == "small"


def test_the_python_api_loads_the_same(quick: Path) -> None:
    assert dist_train.load_config(str(quick), ["--run.seed", "9"]) == load(quick, ["--run.seed", "9"], {}).config


def test_user_code_comes_in_through_import(quick: Path, user_code: Path) -> None:
    (user_code / "user_parts.py").write_text(
        "import dist_train\nfrom dist_train.config.base import Settings\n"
        "class Pause(Settings):\n    seconds: float\n    often: int = 1\n    note: str = ''\n"
        "@dist_train.register_model('user_net')\ndef net(num_classes): ...\n"
        "@dist_train.register_stage('user_pause', settings=Pause)\nclass PauseStage: ...\n"
    )
    options = ["--model.name", "user_net", "--stages", "[train, user_pause]"]
    with pytest.raises(ConfigError) as caught:
        load(quick, options, {})
    assert {problem.place for problem in caught.value.problems} == {"model.name", "stages.1"}

    with pytest.raises(ConfigError, match="user_pause.*is missing"):
        load(quick, ["--import", "user_parts", *options], {})
    with pytest.raises(ConfigError, match=r"did you mean user_pause\.often"):
        load(quick, ["--import", "user_parts", *options, "--user_pause", "{seconds: 1, oftn: 2}"], {})
    loaded = load(quick, ["--import", "user_parts", *options, "--user_pause.seconds", "2"], {})
    assert loaded.sources["user_pause.seconds"] == "--user_pause.seconds"
    options += ["--user_pause.seconds", "2", "--user_pause.note", "1 #2"]
    assert load(quick, ["--import", "user_parts", *options], {}).config.model_dump()["user_pause"]["note"] == "1 #2"
    again = user_code / "again.yaml"
    again.write_text(dump(loaded.config))
    assert load(again, environ={}).config.model_dump() == loaded.config.model_dump()


@pytest.mark.parametrize(
    ("code", "reason"),
    [("1 / 0", r"ZeroDivisionError.*user_broken\.py:1"), ("import not_there_at_all", "ModuleNotFoundError")],
)
def test_a_failing_import_is_a_mistake_with_its_reason(quick: Path, user_code: Path, code: str, reason: str) -> None:
    (user_code / "user_broken.py").write_text(code)
    with pytest.raises(ConfigError, match=reason) as caught:
        load(quick, ["--import", "user_broken", "--train.epochs", "0"], {})
    assert {problem.place for problem in caught.value.problems} == {"user_broken", "train.epochs"}


# -- what is recorded in a run directory --------------------------------------------------------------------------


def changed(options: list[str], recorded: Config) -> dict[str, str]:
    old = yaml.safe_load(dump(recorded))
    new = recorded.model_validate(_set(recorded.model_dump(), options))
    return {problem.place: problem.message for problem in differences(old, new)}


def _set(values: dict[str, object], options: list[str]) -> dict[str, object]:
    for key, value in zip(options[::2], options[1::2], strict=True):
        *sections, last = key.split(".")
        at: dict = values
        for section in sections:
            at = at[section]
        at[last] = yaml.safe_load(value)
    return values


def test_nothing_differs_from_the_recording_of_itself() -> None:
    assert changed([], Config()) == {}


def test_a_change_that_determines_the_result_is_shown() -> None:
    found = changed(["train.optim.lr", "0.2", "stages", "[train]"], Config())
    assert found == {
        "train.optim.lr": "was 0.1, is 0.2",
        "stages": "was [train, ptq, qat, convert, export], is [train]",
    }


def test_workers_logging_and_trackers_may_change() -> None:
    free = ["data.workers", "4", "log.every_steps", "1", "trackers", "[]", "checkpoint.keep.last", "9", "run.name", "b"]
    assert changed(free, Config()) == {}


def test_a_field_that_one_side_lacks_counts_with_its_default() -> None:
    old = Config().model_dump(mode="json")
    del old["precision"], old["train"]["optim"]["lr"], old["qat"]
    assert differences(old, Config()) == []
    new = Config.model_validate({"train": {"optim": {"lr": 0.3}}, "qat": {"epochs": 9}})
    assert {problem.place for problem in differences(old, new)} == {"train.optim.lr", "qat.epochs"}


def test_a_recorded_field_that_is_unknown_now_is_shown() -> None:
    old = Config().model_dump(mode="json") | {"mixing": {"alpha": 0.2}}
    assert [str(problem) for problem in differences(old, Config())] == ["mixing: was {alpha: 0.2}, is unknown now"]


# -- round trip ---------------------------------------------------------------------------------------------------

AWKWARD = [
    "1e5",
    "yes",
    "no",
    "null",
    "~",
    "",
    "0o17",
    "1_000",
    "2020-01-01",
    ".inf",
    "<<",
    "=",
    "- a",
    "a: b",
    "#",
    "01",
]
TEXTS = st.sampled_from(AWKWARD) | st.text(max_size=8)
FLOATS = st.floats(min_value=0, exclude_min=True, max_value=1e6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TREES = st.fixed_dictionaries(
    {},
    optional={
        "run": st.fixed_dictionaries(
            {"name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z"), "timeout": FLOATS},
            optional={"threads_per_rank": st.integers(1, 64) | st.just("auto"), "seed": st.integers(0, 2**63 - 1)},
        ),
        "data": st.fixed_dictionaries({"args": st.dictionaries(TEXTS, JSON, max_size=4)}),
        "train": st.fixed_dictionaries({"optim": st.fixed_dictionaries({"lr": FLOATS})}),
        "qat": st.fixed_dictionaries(
            {"rules": st.lists(st.fixed_dictionaries({"match": TEXTS, "skip": st.just(True)}), max_size=3)}
        ),
    },
)


@settings(deadline=None, max_examples=60, database=None)
@given(tree=TREES)
def test_a_dumped_configuration_loads_equal(tree: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = Config.model_validate(tree)
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file, environ={}).config == config
    assert differences(yaml.safe_load(file.read_text(encoding="utf-8")), config) == []
