"""The command line from outside: what it prints, what it returns, what it imports, what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.config.load import load
from dist_train.config.shipped import configs_dir, shipped
from dist_train.errors import EXIT_CONFIG, EXIT_DONE

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = [
    ["--help"],
    ["--version"],
    ["run", "--help"],
    ["launch", "--help"],
    ["config"],
    ["config", "list"],
    ["config", "schema"],
]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    return clean | {"PYTHONPATH": os.pathsep.join([str(ROOT), clean.get("PYTHONPATH", "")])} | more


def dist_train(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_train", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text("# Small\nrun: {name: small}\nstages: [train]\n")
    return file


@pytest.mark.parametrize(
    "arguments",
    [
        *WITHOUT_TORCH,
        ["config", "show", "small.yaml"],
        ["config", "check", "small.yaml"],
        ["launch", "torchrun", "--dry-run", "small.yaml"],
    ],
)
def test_looking_at_things_does_not_import_torch(arguments: list[str], config: Path) -> None:
    code = (
        "import sys; from dist_train.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'torchvision', 'rich'} & set(sys.modules); sys.exit(code or ' '.join(heavy) or 0)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=config.parent, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    assert done.stdout or arguments == ["config", "list"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "-h"], ["config", "list"], ["launch", "-h"]])
def test_the_first_look_does_not_import_pydantic(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from dist_train.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ('pydantic' if 'pydantic' in sys.modules else 0))"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")


def test_importing_the_package_does_not_import_torch_or_pydantic(tmp_path: Path) -> None:
    code = (
        "import dist_train, sys; dist_train.register_model;"
        "sys.exit(' '.join({'torch', 'pydantic'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0


@pytest.mark.heavy
def test_the_start_costs_little_more_than_its_libraries(config: Path) -> None:
    commands = [
        ["-c", "import pydantic, yaml; pydantic.BaseModel"],
        ["-m", "dist_train", "--help"],
        ["-m", "dist_train", "config", "show", "small.yaml"],
    ]
    times: list[list[float]] = [[], [], []]
    for _ in range(6):  # in turns, as other work on the machine comes and goes
        for command, of_command in zip(commands, times, strict=True):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *command], cwd=config.parent, env=environment(), check=True, stdout=subprocess.DEVNULL
            )
            of_command.append(time.perf_counter() - start)
    bare, overview, shown = map(min, times)
    assert overview < 2 * bare
    assert shown < 5 * bare


@pytest.mark.parametrize(
    ("arguments", "wrong", "hint"),
    [
        (["rnu"], "unknown command rnu", "did you mean dist-train run?"),
        (["config", "shwo"], "unknown command config shwo", "did you mean dist-train config show?"),
        (["zzz"], "unknown command zzz", "one of: run, "),
        (["run"], "needs the configuration first", "dist-train run CONFIG"),
        (["run", "--run.seed", "1"], "needs the configuration first", "dist-train run CONFIG"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read", "shipped configuration"),
        (["run", "smal.yaml"], "smal.yaml: cannot be read", "did you mean small.yaml?"),
        (["run", "small.yaml", "--fast-dev-rnu", "1"], "fast-dev-rnu (--fast-dev-rnu): unknown key", "fast_dev_run"),
        (["config", "check", "small.yaml", "--sede", "1"], "sede (--sede): unknown key", "run.seed"),
        (["config", "copy"], "config copy: missing argument 'NAME'", "usage: dist-train config copy NAME [DEST]"),
        (["config", "copy", "nothing_like_it"], "no shipped configuration 'nothing_like_it'", "->"),
        (["config", "list", "x"], "config list: got unexpected extra argument (x)", "usage: dist-train config list"),
        (["config", "schema", "--run.seed", "1"], "config schema has no option --run.seed", "[--import MODULE]"),
        (["config", "schema", "--import"], "--import has no value", "type --import MODULE"),
        (["config", "schema", "--import", "no_module"], "no_module (--import): cannot be imported", "an installed one"),
        (["--versoin"], "unknown command --versoin", "one of: run, "),
        (["evaluate", "runs/none"], "runs/none does not exist", "runs/NAME"),
        (["evaluate", "."], "has no config.yaml", "runs/NAME"),
        (["evaluate", "--x"], "evaluate has no option --x", "usage: dist-train evaluate RUN_DIR"),
        (["evaluate", "runs/none", "--jsno"], "evaluate has no option --jsno", "did you mean --json?"),
        (["evaluate", "runs/none", "--data.name"], "--data.name has no value", "type --data.name VALUE"),
        (["evaluate", "runs/none", "--model", "--json"], "--model has no value", "type --model MODEL"),
        (["evaluate", "runs/none", "--json=1"], "--json takes no value", "type --json alone"),
        (["export", "small.yaml", "--format", "onxn"], "--format onxn is unknown", "did you mean onnx?"),
        (["export", "small.yaml", "--model", "int9"], "--model int9 is unknown", "did you mean int8?"),
        (["benchmark", "runs/none"], "runs/none does not exist", "runs/NAME"),
        (
            ["benchmark"],
            "benchmark: missing argument 'RUN_DIR'",
            "usage: dist-train benchmark RUN_DIR [--batch-sizes N",
        ),
        (["benchmark", ".", "--batch-sizes", "1", "0"], "--batch-sizes: must be a whole number, at least 1", "N ..."),
        (["benchmark", ".", "--batch-sizes", "--overwrite"], "--batch-sizes has no value", "type --batch-sizes N ..."),
        (["benchmark", ".", "--seconds", "nan"], "--seconds: must be a number above 0, not 'nan'", "type --seconds S"),
        (["predict", "out"], "predict: missing argument 'IMAGE", "usage: dist-train predict ARTIFACT IMAGE..."),
        (["predict", "out", "x.png", "--top", "0"], "--top: must be a whole number, at least 1", "type --top K"),
        (["report"], "report: missing argument 'RUN_DIR", "usage: dist-train report RUN_DIR... [--output DIR]"),
        (["report", "runs/none"], "runs/none does not exist", "runs/NAME"),
        (["doctor", "--onyl", "slurm"], "doctor has no option --onyl", "did you mean --only?"),
        (["doctor", "--only", "slrum"], "--only slrum is unknown", "did you mean slurm?"),
        (["ledger"], "ledger: missing argument 'RUN_DIR'", "usage: dist-train ledger RUN_DIR"),
        (["ledger", "runs/none"], "runs/none does not exist", "runs/NAME"),
    ],
)
def test_wrong_input_ends_with_78_and_leaves_no_file(arguments: list[str], wrong: str, hint: str, config: Path) -> None:
    before = sorted(config.parent.rglob("*"))
    done = dist_train(*arguments, cwd=config.parent)
    assert done.returncode == EXIT_CONFIG
    assert wrong in done.stderr and hint in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert sorted(config.parent.rglob("*")) == before


def test_a_wrong_configuration_stops_run_before_torch_and_before_a_file(config: Path) -> None:
    (config.parent / "sitecustomize.py").write_text(
        "import sys\nclass Refuse:\n    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise RuntimeError('torch was imported')\nsys.meta_path.insert(0, Refuse())\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(config.parent), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["--train.epochs", "0", "--model.name", "resnet5", "--run.dir", "out", "--data.micro_batch_size", "999"]
    refused = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment(**env), capture_output=True, check=False
    )
    assert b"torch was imported" in refused.stderr
    done = dist_train("run", "small.yaml", *options, cwd=config.parent, **env)
    assert done.returncode == EXIT_CONFIG
    assert done.stderr.startswith("dist-train: 3 mistakes in the configuration:")
    assert not (config.parent / "out").exists() and not (config.parent / "runs").exists()


def test_one_rank_shows_the_mistakes_and_all_end_with_78(config: Path) -> None:
    shown = {}
    for rank in ("0", "1"):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        done = dist_train("run", "small.yaml", "--train.epochs", "0", cwd=config.parent, **env)
        assert done.returncode == EXIT_CONFIG
        shown[rank] = "train.epochs" in done.stderr
    assert shown == {"0": True, "1": False}


def test_config_check_says_that_a_configuration_is_right(config: Path) -> None:
    done = dist_train("config", "check", "small.yaml", "--fast-dev-run", cwd=config.parent)
    assert done.returncode == EXIT_DONE
    assert done.stdout == f"small.yaml is right: train in {Path('runs') / 'small-fast-dev-run'}\n"


def test_config_show_names_the_source_of_every_value(config: Path) -> None:
    done = dist_train("config", "show", "small.yaml", "--run.seed", "5", cwd=config.parent)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert {"name: small # small.yaml:2", "seed: 5 # --run.seed", "stages: [train] # small.yaml:3"} <= set(lines)


def test_settings_reach_the_configuration_as_they_were_typed(config: Path) -> None:
    typed = [
        "--train.optim.lr=1e-3",
        "--data.args",
        "{low: -1}",
        "--model.args",
        "-1",
        "--import=json",
        "--fast-dev-run",
    ]
    wrong = dist_train("config", "show", "small.yaml", *typed, "--", cwd=config.parent)
    assert (
        "-- : is not an option" in wrong.stderr.replace("--:", "-- :") and "model.args (--model.args)" in wrong.stderr
    )
    done = dist_train("config", "show", "small.yaml", *typed[:3], *typed[5:], cwd=config.parent)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert {"lr: 0.001 # --train.optim.lr", "args: {low: -1} # --data.args"} <= set(lines)
    assert "fast_dev_run: true # --debug.fast_dev_run" in lines


@pytest.mark.parametrize(
    "words", [["run"], ["run", "small.yaml"], ["launch", "slurm", "small.yaml"], ["config", "copy"]]
)
@pytest.mark.parametrize("help", ["-h", "--help"])
def test_help_is_shown_for_a_verb_wherever_it_is_asked_for(words: list[str], help: str, config: Path) -> None:
    done = dist_train(*words, help, cwd=config.parent)
    verb = " ".join(word for word in words if word != "small.yaml")
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    assert done.stdout.startswith(f"Usage: dist-train {verb} ")


def test_the_committed_schema_is_current(tmp_path: Path) -> None:
    done = dist_train("config", "schema", cwd=tmp_path)
    committed = ROOT / "configs" / "schema.json"
    assert committed.read_text() == done.stdout, "dist-train config schema > configs/schema.json"


def test_the_schema_completes_names_and_describes_settings(tmp_path: Path) -> None:
    schema = json.loads(dist_train("config", "schema", cwd=tmp_path).stdout)
    definitions = schema["$defs"]
    assert "resnet50" in definitions["ModelConfig"]["properties"]["name"]["examples"]
    assert "auto" in schema["properties"]["strategy"]["examples"]
    assert "train" in schema["properties"]["stages"]["items"]["examples"]
    assert "global_batch_size" in definitions["DataConfig"]["properties"]
    assert definitions["DataConfig"]["properties"]["global_batch_size"]["description"].startswith("Samples of one")
    assert schema["additionalProperties"] is False


def test_shipped_configurations_are_right_point_to_the_schema_and_are_listed(tmp_path: Path) -> None:
    listed = dist_train("config", "list", cwd=tmp_path).stdout
    assert configs_dir() == ROOT / "configs"
    for name, file in shipped().items():
        assert file.read_text().startswith("# yaml-language-server: $schema=schema.json\n"), file
        assert load(file, environ={}).config
        line = next(line for line in listed.splitlines() if line.split()[0] == name)
        assert len(line.split()) > 1 and "yaml-language-server" not in line


def test_config_copy_never_overwrites_and_keeps_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train.cli import main

    (tmp_path / "shipped").mkdir()
    (tmp_path / "mine").mkdir()
    text = "# yaml-language-server: $schema=schema.json\n# A small one\nrun: {name: small}\n"
    (tmp_path / "shipped" / "small.yaml").write_text(text)
    monkeypatch.setattr("dist_train.config.shipped.configs_dir", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert main(["config", "copy", "small"]) == EXIT_DONE
    assert main(["config", "copy", "small", "mine"]) == EXIT_DONE
    copied = (tmp_path / "small.yaml").read_text()
    schema = tmp_path / "shipped" / "schema.json"
    assert copied.splitlines() == [f"# yaml-language-server: $schema={schema}", *text.splitlines()[1:]]
    assert (tmp_path / "mine" / "small.yaml").read_text() == copied
    (tmp_path / "small.yaml").write_text("mine")
    assert main(["config", "copy", "small"]) == EXIT_CONFIG
    assert (tmp_path / "small.yaml").read_text() == "mine"
    assert main(["config", "copy", "small", "no/such/folder/x.yaml"]) == EXIT_CONFIG


def test_config_list_shows_the_first_line_of_each_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_train.cli import main

    (tmp_path / "a.yaml").write_text(
        "# yaml-language-server: $schema=schema.json\n#\n# The first one\n# more\nrun: {}\n"
    )
    (tmp_path / "bcd.yaml").write_text("run: {}\n# not the head\n")
    monkeypatch.setattr("dist_train.config.shipped.configs_dir", lambda: tmp_path)
    assert main(["config", "list"]) == EXIT_DONE
    assert capsys.readouterr().out == "a    The first one\nbcd\n"


def test_the_public_names_are_listed_and_an_unknown_one_is_refused() -> None:
    import dist_train as package
    from dist_train import registry

    assert set(package.__all__) <= set(dir(package))
    assert package.register_model == registry.models.register
    assert package.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing_like_it'"):
        package.nothing_like_it  # noqa: B018
