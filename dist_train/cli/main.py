"""The command line: finds the verb, checks what was typed, and only then imports what does the work (and torch)."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.cli import launch as cli_launch
from dist_train.cli.doctor import DOCTOR
from dist_train.cli.finished_run import ARTIFACT_VERBS
from dist_train.cli.verbs import Verb, import_only, known_run_dir, positionals
from dist_train.cluster.rank_plan import EXIT_FILE, exit_code_when_preempted
from dist_train.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError, DistTrainError, Preempted, UsageError

if TYPE_CHECKING:
    from dist_train.config.load import Loaded

SETTINGS = """\
CONFIG is a YAML file, or the name of a shipped configuration (dist-train config list).
  --dotted.key VALUE     change a setting; VALUE is YAML: --train.optim.lr 1e-3, --data.augment.0.padding 2
  --import MODULE        import a module first that registers models, datasets, stages, ...; repeatable
  --fast-dev-run         two batches of every stage, in a run directory of its own"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, shows its errors without a traceback, and returns the exit code (see `dist_train.errors`)."""
    try:
        return _dispatch(VERBS, "", list(sys.argv[1:] if arguments is None else arguments))
    except Preempted as stop:
        if arguments is None:  # the program itself, not a call of it
            from dist_train.distributed.watchdog.stop_signals import ignore_until_exit

            ignore_until_exit()
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"dist-train: {stop}", file=sys.stderr)
        return exit_code_when_preempted(os.environ)
    except DistTrainError as error:
        if not (isinstance(error, ConfigError) and _another_rank_shows_it(os.environ)):
            print(f"dist-train: {error}", file=sys.stderr)
        if error.exit_code == EXIT_CONFIG and EXIT_FILE in os.environ:
            with suppress(OSError):
                Path(os.environ[EXIT_FILE]).touch()
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
        return EXIT_FAILED


def _another_rank_shows_it(environ: Mapping[str, str]) -> bool:
    """All ranks of a node find the same mistakes: one shows them. Another node may have others (a missing folder)."""
    if environ.get("WORLD_SIZE", environ.get("SLURM_STEP_NUM_TASKS", "1")) == "1":
        return False
    rank = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", environ.get("RANK", "0")))
    return rank.isdecimal() and int(rank) > 0


def _dispatch(verbs: dict[str, Verb], group: str, arguments: list[str]) -> int:
    prefix = f"{group} ".lstrip()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(verbs, prefix))
        return EXIT_DONE
    name, *rest = arguments
    if name == "--version" and not group:
        from dist_train import __version__

        print(f"dist-train {__version__}")
        return EXIT_DONE
    if name not in verbs:
        alike = difflib.get_close_matches(name, verbs, n=1, cutoff=0.5)
        hint = f"did you mean dist-train {prefix}{alike[0]}?" if alike else f"one of: {', '.join(verbs)}"
        raise UsageError(f"unknown command {prefix}{name}", hint)
    if name != "config" and any(word in ("-h", "--help") for word in rest):
        print(verbs[name].help(prefix))
        return EXIT_DONE
    return verbs[name].call(rest)


def _overview(verbs: dict[str, Verb], prefix: str) -> str:
    width = max(len(name) for name in verbs)
    lines = [f"usage: dist-train {prefix}COMMAND ...", ""]
    for verb in verbs.values():
        lines += [f"  {verb.name:<{width}}  {verb.summary}"]
        lines += [f"  {'':<{width}}  {verb.usage}"] if verb.usage else []
    if not prefix:
        lines += ["", SETTINGS, "", "several processes: dist-train launch torchrun --nproc-per-node N CONFIG ..."]
        lines += ["exit codes: 0 done, 1 failed, 75 preempted (run the same command again), 78 wrong configuration"]
    return "\n".join(lines)


def _load(name: str, arguments: list[str]) -> Loaded:
    if not arguments or arguments[0].startswith("-"):
        hint = f"dist-train {name} CONFIG --dotted.key VALUE; dist-train config list shows the shipped ones"
        raise UsageError(f"{name} needs the configuration first, then the options", hint)
    from dist_train.config.load import load

    return load(arguments[0], arguments[1:])


def _train_verb(arguments: list[str]) -> int:
    loaded = _load("run", arguments)
    from dist_train.distributed.watchdog.stop_signals import listening

    with listening():  # before the imports that take seconds
        from dist_train.pipeline.run import run

        run(loaded.config, loaded.warnings)
    return EXIT_DONE


def _ledger_verb(arguments: list[str]) -> int:
    run_dir = Path(positionals("ledger", "RUN_DIR", arguments, 1, 1)[0])
    if not (run_dir / "ledger").is_dir():
        known_run_dir("ledger", arguments)
    from dist_train.run_dir.ledger import check

    report = check(run_dir)
    print(report)
    return EXIT_DONE if report.ok else EXIT_FAILED


def _report_verb(arguments: list[str]) -> int:
    output, run_dirs = None, []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--output":
            run_dirs.append(known_run_dir("report", [word]))
            continue
        folder = value if equals else next(words, "")
        if not folder or folder.startswith("-"):
            raise UsageError("--output needs a folder", "dist-train report RUN_DIR --output DIR")
        output = Path(folder)
    if not run_dirs:
        raise UsageError("report needs a run", "dist-train report runs/NAME")
    from dist_train.report.write import write_report

    print(write_report(list(dict.fromkeys(run_dirs)), output))
    return EXIT_DONE


def _config_verb(arguments: list[str]) -> int:
    return _dispatch(CONFIG_VERBS, "config", arguments)


def _config_list(arguments: list[str]) -> int:
    positionals("config list", "", arguments, 0, 0)
    from dist_train.config.load import shipped

    files = shipped()
    width = max((len(name) for name in files), default=0)
    for name, file in files.items():
        print(f"{name:<{width}}  {_first_comment(file)}".rstrip())
    return EXIT_DONE


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#"):
            break
        if text and not text.startswith("yaml-language-server"):
            return text
    return ""


def _config_show(arguments: list[str]) -> int:
    loaded = _load("config show", arguments)
    from dist_train.config.load import annotated

    print(annotated(loaded), end="")
    return EXIT_DONE


def _config_copy(arguments: list[str]) -> int:
    name, *given = positionals("config copy", "NAME [DEST]", arguments, 1, 2)
    from dist_train.config.load import configs_dir, shipped

    files = shipped()
    if name not in files:
        alike = difflib.get_close_matches(name, files, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(alike)}?" if alike else f"one of: {', '.join(files)}"
        raise UsageError(f"there is no shipped configuration {name!r}", hint)
    dest = Path(given[0]) if given else Path(f"{name}.yaml")
    dest = dest / f"{name}.yaml" if dest.is_dir() else dest
    # The copy lies elsewhere, so its line for editors names the schema by its whole path.
    schema = re.compile(r"(?<=^# yaml-language-server: \$schema=).*")
    text = schema.sub(lambda _: str(configs_dir() / "schema.json"), files[name].read_text(encoding="utf-8"), count=1)
    try:
        with dest.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{dest} is there already, and is not overwritten", "give another name as DEST") from None
    except OSError as error:
        raise UsageError(f"{dest} cannot be written: {error.strerror}", "give another name as DEST") from None
    print(dest)
    return EXIT_DONE


def _config_schema(arguments: list[str]) -> int:
    import_only("config schema", arguments)
    from dist_train.config.load import json_schema

    print(json_schema(), end="")
    return EXIT_DONE


def _config_reference(arguments: list[str]) -> int:
    import_only("config reference", arguments)
    from dist_train.config.reference import reference

    print(reference(), end="")
    return EXIT_DONE


def _config_check(arguments: list[str]) -> int:
    loaded = _load("config check", arguments)
    config = loaded.config
    for warning in loaded.warnings:
        print(f"warning: {warning}")
    print(f"{arguments[0]} is right: {', '.join(config.stages)} in {config.run_dir}")
    return EXIT_DONE


VERBS = {
    verb.name: verb
    for verb in (
        Verb(
            "run", "CONFIG [--dotted.key VALUE ...]", "run the stages; the same command resumes", _train_verb, SETTINGS
        ),
        *ARTIFACT_VERBS,
        Verb(
            "launch",
            cli_launch.USAGE,
            "start the ranks of a run, here or as a batch job",
            cli_launch.launch,
            cli_launch.help_text(SETTINGS),
        ),
        Verb(
            "config",
            "list|show|copy|schema|reference|check ...",
            "look at configurations, without running them",
            _config_verb,
        ),
        Verb(
            "report",
            "RUN_DIR... [--output DIR]",
            "a page with the curves and results of one or several runs",
            _report_verb,
            "Writes report.html, plots/*.png and tables/*.csv to DIR; by default to RUN_DIR/report, for several runs to report.",
        ),
        DOCTOR,
        Verb("ledger", "RUN_DIR", "check that every sample was consumed once an epoch", _ledger_verb),
    )
}
CONFIG_VERBS = {
    verb.name: verb
    for verb in (
        Verb("list", "", "the shipped configurations", _config_list),
        Verb(
            "show", "CONFIG [--dotted.key VALUE ...]", "every setting, and where it came from", _config_show, SETTINGS
        ),
        Verb("copy", "NAME [DEST]", "copy a shipped configuration, to change it; never overwrites", _config_copy),
        Verb("schema", "[--import MODULE]", "the JSON schema that editors complete from", _config_schema),
        Verb("reference", "[--import MODULE]", "every setting, as Markdown tables", _config_reference),
        Verb("check", "CONFIG [--dotted.key VALUE ...]", "report every mistake, run nothing", _config_check, SETTINGS),
    )
}
