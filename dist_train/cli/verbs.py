"""What the verbs of the command line are made of. Starts without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.errors import ConfigError, RunDirError, UsageError


@dataclass(frozen=True)
class Verb:
    """One verb: `call` gets what was typed after it, and returns the exit code."""

    name: str
    usage: str
    summary: str
    call: Callable[[list[str]], int]
    details: str = ""

    def help(self, prefix: str) -> str:
        lines = [f"usage: dist-train {prefix}{self.name} {self.usage}".rstrip(), "", self.summary]
        return "\n".join(lines + (["", self.details] if self.details else []))


def positionals(name: str, usage: str, arguments: list[str], least: int, most: int) -> list[str]:
    for word in arguments:
        if word.startswith("-"):
            raise UsageError(f"{name} has no option {word}", f"usage: dist-train {name} {usage}")
    if not least <= len(arguments) <= most:
        wrong = "too few" if len(arguments) < least else "too many"
        raise UsageError(f"{name}: {wrong} arguments", f"usage: dist-train {name} {usage}")
    return arguments


@dataclass(frozen=True)
class Typed:
    """What was typed after a verb.

    Attributes:
        words: what is no option.
        options: option without its dashes -> its values, in order.
        settings: options with a dot, as they were typed.
    """

    words: list[str]
    options: Mapping[str, list[str]]
    settings: list[str] = field(default_factory=list)

    def last(self, option: str, default: str | None = None) -> str | None:
        """The value of an option that counts once."""
        return self.options[option][-1] if option in self.options else default


def typed(
    verb: str,
    usage: str,
    arguments: list[str],
    options: Collection[str],
    flags: Collection[str] = (),
    section: str = "",
) -> Typed:
    """Sorts words from options: `--name VALUE`, `--name=VALUE`, flags without a value, and settings `--section.key VALUE`.

    Raises:
        UsageError: an option that the verb does not have, or one without its value.
    """
    hint = f"usage: dist-train {verb} {usage}"
    words: list[str] = []
    found: dict[str, list[str]] = {}
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if name in flags and not equals:
            found[name] = []
            continue
        if name not in options and not (section and name.startswith(f"{section}.")):
            alike = difflib.get_close_matches(name, [*options, *flags], n=1, cutoff=0.5)
            raise UsageError(f"{verb} has no option {word}", f"did you mean --{alike[0]}? {hint}" if alike else hint)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{name} has no value", f"type --{name} VALUE or --{name}=VALUE")
            value = rest.pop(0)
        if name in options:
            found.setdefault(name, []).append(value)
        else:
            settings += [f"--{name}", value]
    return Typed(words, found, settings)


def one_of(option: str, value: str, known: Collection[str]) -> str:
    """`value`, where it is known; raises UsageError."""
    if value in known:
        return value
    alike = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    raise UsageError(
        f"--{option} {value} is unknown", f"did you mean {alike[0]}?" if alike else f"one of: {', '.join(known)}"
    )


def import_user_modules(names: list[str]) -> None:
    """For `--import MODULE`; raises ConfigError with each that cannot be imported."""
    from dist_train.config.load import import_modules

    problems = import_modules(names)
    if problems:
        raise ConfigError(problems)


def known_run_dir(name: str, arguments: list[str]) -> Path:
    run_dir = Path(positionals(name, "RUN_DIR", arguments, 1, 1)[0])
    if not (run_dir / "config.yaml").is_file():
        what = "has no config.yaml: it is no run directory" if run_dir.is_dir() else "does not exist"
        known = [str(found.parent) for found in sorted(run_dir.parent.glob("*/config.yaml"))]
        alike = difflib.get_close_matches(str(run_dir), known, n=2, cutoff=0.5)
        hint = "did you mean " + " or ".join(alike) + "?" if alike else "give the directory of a run, runs/NAME"
        raise RunDirError(f"{run_dir} {what}", hint)
    return run_dir


def import_only(name: str, arguments: list[str]) -> None:
    """For verbs whose only option is `--import MODULE`."""
    from dist_train.config.load import import_modules, split_options

    options, modules, problems = split_options(arguments)
    if options:
        raise UsageError(f"{name} takes no settings: {options[0][0]}", f"dist-train {name} --help")
    problems += import_modules(modules)
    if problems:
        raise ConfigError(problems)
