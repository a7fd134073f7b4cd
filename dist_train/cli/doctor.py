"""`dist-train doctor`: tests this machine. Starts without importing torch."""

from __future__ import annotations

from collections.abc import Iterable

import click

from dist_train.cli.verbs import OneOf, Verb, complete_config, option
from dist_train.errors import UsageError, did_you_mean


def _sections() -> Iterable[str]:
    from dist_train.doctor.checks import SECTIONS

    return SECTIONS


class _Doctor(Verb):
    ignore_unknown_options = True  # they are settings of CONFIG


@click.command(cls=_Doctor)
@click.argument("words", metavar="[CONFIG] [--dotted.key VALUE ...]", nargs=-1, shell_complete=complete_config)
@option("--only", "SECTION", "This section alone; repeatable.", type=OneOf(_sections), multiple=True)
@click.option("--deep", is_flag=True, help="Try every export format too: about a minute.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(words: tuple[str, ...], only: tuple[str, ...], deep: bool, as_json: bool) -> int:
    """Tests what works on this machine, and says what to type where something does not.

    Looks at the ranks that this environment gives, versions, devices, the network, an all-reduce of two ranks, the
    machine, Slurm and wandb. Tries each quantization backend on a small model, and each export format with --deep or
    --only lowering. With CONFIG, also looks at what that needs: its settings, run directory, device and formats. Every
    line is good, a warning or bad; plain text without secrets, to paste.

    \b
    Sections: ranks versions devices network all-reduce machine slurm wandb quantization lowering
    Exit codes: 0 good or warnings only, 1 something is bad, 78 the configuration or the environment's variables are.
    """
    from dist_train.doctor.diagnose import diagnose

    if words and words[0].startswith("-"):
        guess = did_you_mean(words[0], ["--only", "--deep", "--json"], count=1)
        hint = (
            f"{guess} usage: dist-train doctor [CONFIG] [--only SECTION ...] [--deep] [--json] [--dotted.key VALUE ...]"
        )
        raise UsageError(f"doctor has no option {words[0]} without a configuration", hint.strip())
    return diagnose(words, only or tuple(_sections()), as_json, deep or "lowering" in only)
