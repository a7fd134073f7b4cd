"""The command line: finds the verb, checks what was typed, and only then imports what does the work (and torch)."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from dist_train.cli.config import config_verbs
from dist_train.cli.doctor import doctor
from dist_train.cli.finished_run import benchmark, evaluate, export, predict
from dist_train.cli.launch import launch
from dist_train.cli.pack import pack
from dist_train.cli.run_place import DIRECTORY, RunPlace, known_run_dir, run_dirs
from dist_train.cli.verbs import PROGRAM, SETTINGS, ConfigVerb, Verb, Verbs, option
from dist_train.cluster.error_notes import show_once, tell_agent
from dist_train.cluster.rank_plan import EXIT_FILE, exit_code_when_preempted
from dist_train.errors import (
    EXIT_CONFIG,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    ConfigError,
    DataError,
    DistTrainError,
    ForeignError,
    NodeLeft,
    PeerError,
    Preempted,
    in_words,
    keep_traceback,
    printable,
)

_COMPLETE = "_DIST_TRAIN_COMPLETE"  # set by a shell that completes; `bash_source` prints what bash needs
_EPILOG = f"""\
{SETTINGS}

\b
Several processes: dist-train launch torchrun --nproc-per-node N CONFIG ...
Exit codes: 0 done, 1 failed, 75 preempted (run the same command again), 78 wrong configuration
Completion in bash (or zsh, fish): eval "$({_COMPLETE}=bash_source dist-train)\""""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, shows its errors without a traceback, and returns the exit code (see `dist_train.errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments is None and os.environ.get(_COMPLETE):
            from click.shell_completion import shell_complete

            return shell_complete(verbs, {}, PROGRAM, _COMPLETE, os.environ[_COMPLETE])
        with verbs.make_context(PROGRAM, words) as context:
            code: int = verbs.invoke(context)
            return code
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except Preempted as stop:
        if arguments is None:  # the program itself, not a call of it
            from dist_train.distributed.watchdog.stop_signals import ignore_until_exit

            ignore_until_exit()
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"dist-train: {stop}", file=sys.stderr)
        # Another exit code than 0 makes torchrun's agent start the ranks again, without the node that left.
        return EXIT_PREEMPTED if isinstance(stop, NodeLeft) else exit_code_when_preempted(os.environ)
    except DistTrainError as error:
        if isinstance(error, (ForeignError, ConfigError, DataError)) and not error.kept_in:
            keep_traceback(error, _traceback_file())
        return _show(error)
    except click.UsageError as error:  # such as `--` alone
        print(f"dist-train: {error.format_message().rstrip('.').lower()}\n  -> {PROGRAM} --help", file=sys.stderr)
        return EXIT_CONFIG
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("dist-train: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BaseException as error:  # of other code, or a fault of ours
        found = in_words(error)
        assert isinstance(found, DistTrainError)
        keep_traceback(found, _traceback_file())
        return _show(found)


def _traceback_file() -> str:
    return os.path.join(tempfile.gettempdir(), f"dist-train-error-{os.getpid()}.txt")


def _show(error: DistTrainError) -> int:
    """Prints an error and returns the exit code."""
    tell_agent(f"dist-train: {error}", os.environ, echo=isinstance(error, PeerError))
    # The ranks find the same mistakes in a configuration: one of a node shows them. Paths of tracebacks differ by rank.
    if isinstance(error, ConfigError):
        show_once(error.message, os.environ, lambda: _say(error))
    else:
        _say(error)
    if error.exit_code == EXIT_CONFIG and EXIT_FILE in os.environ:
        with suppress(OSError):
            Path(os.environ[EXIT_FILE]).touch()
    return error.exit_code


def _say(error: DistTrainError) -> None:
    print(f"dist-train: {error}", file=sys.stderr, flush=True)


def _show_version(ctx: click.Context, option: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        from dist_train import __version__

        print(f"{PROGRAM} {__version__}")
        ctx.exit()


@click.group(cls=Verbs, subcommand_metavar="COMMAND ...", epilog=_EPILOG, context_settings={"max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def verbs() -> None:
    """Distributed training on PyTorch, from float to a verified int8 artifact."""


@verbs.command(cls=ConfigVerb)
def run(config: str, settings: tuple[str, ...]) -> int:
    """Runs the stages; the same command resumes."""
    from dist_train.config.load import load

    loaded = load(config, settings)
    from dist_train.distributed.watchdog.stop_signals import listening

    with listening():  # before the imports that take seconds
        from dist_train.pipeline.run import run

        run(loaded.config, loaded.warnings)
    return EXIT_DONE


@click.command(cls=Verb)
@click.argument(
    "run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=RunPlace(changes=True), callback=run_dirs
)
@option("--output", "DIR", "Folder to write to.", type=DIRECTORY)
def report(run_dirs: tuple[Path, ...], output: Path | None) -> int:
    """Writes a page with the curves and results of one or several runs.

    Writes report.html, plots/*.png and tables/*.csv to DIR; by default to RUN_DIR/report, for several runs to report.
    """
    from dist_train.report.write import write_report

    print(write_report(list(dict.fromkeys(run_dirs)), output))
    return EXIT_DONE


@click.command(cls=Verb)
@click.argument("run_dir", metavar="RUN_DIR", type=RunPlace())
def ledger(run_dir: Path) -> int:
    """Checks that every sample was consumed once an epoch, or as it was drawn by weight."""
    if not (run_dir / "ledger").is_dir() and not any(run_dir.glob("replica-*/ledger")):
        known_run_dir(run_dir)
    from dist_train.finished_run.ledger import check_ledger

    report = check_ledger(run_dir)
    print(printable(str(report)))
    return EXIT_DONE if report.ok else EXIT_FAILED


for verb in (evaluate, export, benchmark, predict, launch, config_verbs, pack, report, doctor, ledger):
    verbs.add_command(verb)
