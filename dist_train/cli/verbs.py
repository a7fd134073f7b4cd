"""Building blocks of the verbs: click commands that raise our errors. Starts without importing torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dist_train.errors import ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PROGRAM = "dist-train"
SETTINGS = """\
\b
CONFIG is a YAML file, or the name of a shipped configuration (dist-train config list).
  --dotted.key VALUE  change a setting: --train.optim.lr 1e-3, --data.augment.0.padding 2; VALUE is the text as typed
                      for names and paths, and YAML for all else
  --import MODULE     first import a module that registers models, datasets, stages, ...; repeatable
  --fast-dev-run      two batches of every stage, in a run directory of its own"""


def verb_name(ctx: click.Context) -> str:
    """Returns the words that lead to the verb, without the program's name: "config show"."""
    return ctx.command_path.removeprefix(PROGRAM).strip()


_JOINED = "\0"  # marks, while words are parsed, a value like an option that was typed as --option=--value


class Valued(click.Option):
    """An option with a value; one like an option, as after `--option --other`, must be typed as --option=--value."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        several = isinstance(value, list | tuple)
        if any(str(each).startswith("--") for each in (value if several else [value])):
            raise click.BadOptionUsage(self.opts[0], "requires an argument", ctx)
        return super().type_cast_value(ctx, [_as_typed(each) for each in value] if several else _as_typed(value))


def _as_typed(value: Any) -> Any:
    return value.replace(_JOINED, "") if isinstance(value, str) else value


class Whole(click.ParamType):
    """A whole number in plain digits, from `least` to `most`."""

    name = "whole number"

    def __init__(self, least: int, most: int | None = None) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if text.isascii() and text.isdecimal() and self._least <= int(text) <= (self._most or int(text)):
            return int(text)
        upper = "" if self._most is None else f" and at most {self._most}"
        self.fail(f"must be a whole number, at least {self._least}{upper}, not {text!r}", param, ctx)


class Number(click.ParamType):
    """A finite number above 0."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            self.fail(f"must be a number above 0, not {str(value)!r}", param, ctx)
        return number


class Several(Valued):
    """An option that takes all words up to the next option: --batch-sizes 1 32. It is made with multiple=True."""


def _one_value_each(words: Sequence[str], several: Iterable[str]) -> list[str]:
    """Repeats the options `several` before each of their words: --sizes 1 32 becomes --sizes=1 --sizes=32."""
    repeated, option = list[str](), ""
    for place, word in enumerate(words, 1):
        if word.startswith("--"):
            valued = place < len(words) and not words[place].startswith("--")
            option = word if word in several and valued else ""
            repeated += [] if option else [word]
        else:
            repeated.append(f"{option}={word}" if option else word)
    return repeated


def option(name: str, metavar: str, help: str, **kwargs: Any) -> Callable[[Any], Any]:
    """Returns the decorator of an option with a value."""
    names = [name, *filter(None, [kwargs.pop("field", "")])]
    return click.option(*names, **{"cls": Valued} | kwargs, metavar=metavar, help=help)


_IMPORT = "First import a module that registers what is used; repeatable."
imports = option("--import", "MODULE", _IMPORT, field="modules", multiple=True)


class Verb(click.Command):
    """A command that raises our errors instead of click's, and shows its arguments before its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            words = ["--help"] if {"-h", "--help"} & set(args) else args
            several = [param.opts[0] for param in self.params if isinstance(param, Several)]
            words = _one_value_each(words, several) if several else words
            rest = super().parse_args(ctx, [re.sub(r"^(--[^=]+=)(?=--)", rf"\1{_JOINED}", word) for word in words])
            for name, value in ctx.params.items():
                if isinstance(value, tuple):  # words passed on as they were typed
                    ctx.params[name] = tuple(map(_as_typed, value))
            return rest
        except click.UsageError as error:
            raise self.refusal(ctx, error, args) from None

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        arguments = [param.metavar or "" for param in self.params if isinstance(param, click.Argument)]
        options = [param for param in self.params if isinstance(param, click.Option)]
        return [*arguments, *(f"[{' '.join(filter(None, (each.opts[0], each.metavar)))}]" for each in options)]

    def refusal(self, ctx: click.Context, error: click.UsageError, args: Sequence[str]) -> UsageError:
        """Returns our error for a mistake that click found in `args`."""
        name = verb_name(ctx)
        usage = " ".join(["usage:", PROGRAM, name, *self.collect_usage_pieces(ctx)])
        if isinstance(error, click.NoSuchOption):
            known = [option for param in self.params if isinstance(param, click.Option) for option in param.opts]
            guess = did_you_mean(error.option_name, known, count=1)
            return UsageError(f"{name} has no option {error.option_name}", f"{guess} {usage}".strip())
        if isinstance(error, click.BadOptionUsage):
            option = error.option_name
            value = next((param.metavar for param in self.get_params(ctx) if option in param.opts), None)
            if value is None:
                return UsageError(f"{option} takes no value", f"type {option} alone")
            return UsageError(f"{option} has no value", f"type {option} {value} or {option}={value}")
        if isinstance(error, click.BadParameter) and isinstance(error.param, click.Option):
            option = error.param.opts[0]
            return UsageError(f"{option}: {error.message.rstrip('.')}", f"type {option} {error.param.metavar}")
        message = error.format_message().rstrip(".")
        return UsageError(f"{name}: {message[:1].lower()}{message[1:]}", usage)


class ConfigVerb(Verb):
    """A command with a configuration: what follows CONFIG are settings, passed on as they were typed."""

    allow_interspersed_args = False  # parsing of options ends at the first other word, CONFIG

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"epilog": SETTINGS} | kwargs)
        self.params += [
            click.Argument(["config"], metavar="CONFIG", shell_complete=complete_config),
            click.Argument(["settings"], metavar="[--dotted.key VALUE ...]", nargs=-1, type=click.UNPROCESSED),
        ]

    def refusal(self, ctx: click.Context, error: click.UsageError, args: Sequence[str]) -> UsageError:
        if not isinstance(error, click.NoSuchOption | click.MissingParameter):
            return super().refusal(ctx, error, args)
        name = verb_name(ctx)
        hint = f"{PROGRAM} {name} CONFIG --dotted.key VALUE; {PROGRAM} config list shows the shipped ones"
        return UsageError(f"{name} needs the configuration first, then the options", hint)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if not ctx.params.get("config"):
            return super().shell_complete(ctx, incomplete)
        from dist_train.config.tree import Config, leaves

        return completions(["--import", "--fast-dev-run", *(f"--{key}" for key, _, _ in leaves(Config()))], incomplete)


class DottedVerb(Verb):
    """A command that takes `--SECTION.KEY VALUE` with any KEY: its function gets pairs ("--SECTION.KEY", VALUE)."""

    section = ""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        found: list[tuple[str, str]] = []

        def keep(ctx: click.Context, option: click.Parameter, values: tuple[str, ...]) -> None:
            found.extend((option.opts[0], value) for value in values)

        names = sorted({word.partition("=")[0] for word in args if word.startswith(f"--{self.section}.")})
        ctx.meta[self.section] = [
            Valued([f"_{number}", name], metavar="VALUE", multiple=True, expose_value=False, callback=keep)
            for number, name in enumerate(names)
        ]
        rest = super().parse_args(ctx, args)
        ctx.params[self.section] = found
        return rest

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(self.section, [])]

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), f"[--{self.section}.KEY VALUE ...]"]


class Verbs(click.Group):
    """A group of verbs; without one, or with `help`, it shows them in the order in which they were added."""

    command_class = Verb

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] in ([], ["help"], ["-h"]) and not ctx.resilient_parsing:
            args = ["--help"]
        try:
            return super().parse_args(ctx, list(args))
        except click.UsageError:
            raise self.unknown(ctx, args[0]) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise self.unknown(ctx, args[0])
        return super().resolve_command(ctx, args)

    def unknown(self, ctx: click.Context, word: str) -> UsageError:
        """Returns the error for a word that is no verb of the group."""
        prefix = f"{verb_name(ctx)} ".lstrip()
        guess = did_you_mean(word, self.commands, count=1, before=f"{PROGRAM} {prefix}")
        return UsageError(f"unknown command {prefix}{word}", guess or f"one of: {', '.join(self.commands)}")

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.subcommand_metavar]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name, command in self.commands.items():
            usage = " ".join(command.collect_usage_pieces(ctx))
            rows.append((name, f"\b\n{command.get_short_help_str(200)}\n{usage}".rstrip()))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class OneOf(click.ParamType):
    """The type of an option that takes one of `names()`, which is called only when the option is given."""

    name = "name"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        names = list(self.names())
        if value not in names:
            option = param.opts[0] if param else ""
            hint = did_you_mean(value, names, count=1) or f"one of: {', '.join(names)}"
            raise UsageError(f"{option} {value} is unknown", hint)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return completions(self.names(), incomplete)


def completions(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def complete_config(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the shipped configurations and the YAML files here; where none fits, the shell completes any file."""
    from click.shell_completion import CompletionItem

    from dist_train.config.shipped import shipped

    here = sorted(str(file) for file in Path().glob("*.y*ml"))
    return completions([*shipped(), *here], incomplete) or [CompletionItem(incomplete, type="file")]


def import_user_modules(names: Sequence[str]) -> None:
    """Imports the modules of `--import`; raises ConfigError with each that cannot be imported."""
    from dist_train.config.load import import_modules

    problems = import_modules(names)
    if problems:
        raise ConfigError(problems)
