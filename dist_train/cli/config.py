"""`dist-train config`: looks at configurations, without running them. Starts without importing torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dist_train.cli.verbs import ConfigVerb, Verbs, completions, import_user_modules, imports
from dist_train.errors import EXIT_DONE, UsageError, did_you_mean, printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


@click.group("config", cls=Verbs, subcommand_metavar="list|show|copy|schema|reference|check ...")
def config_verbs() -> None:
    """Looks at configurations, without running them."""


@config_verbs.command("list")
def list_shipped() -> int:
    """Lists the shipped configurations."""
    from dist_train.config.shipped import first_comment, shipped

    files = shipped()
    width = max((len(name) for name in files), default=0)
    for name, file in files.items():
        print(f"{name:<{width}}  {first_comment(file)}".rstrip())
    return EXIT_DONE


@config_verbs.command(cls=ConfigVerb)
def show(config: str, settings: tuple[str, ...]) -> int:
    """Shows every setting, and where it came from."""
    from dist_train.config.load import annotated, load

    print(annotated(load(config, settings)), end="")
    return EXIT_DONE


def _complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from dist_train.config.shipped import shipped

    return completions(shipped(), incomplete)


@config_verbs.command()
@click.argument("name", metavar="NAME", shell_complete=_complete_name)
@click.argument("dest", metavar="[DEST]", required=False, type=click.Path(path_type=Path))
def copy(name: str, dest: Path | None) -> int:
    """Copies a shipped configuration, to change it; never overwrites."""
    from dist_train.config.shipped import configs_dir, shipped

    files = shipped()
    if name not in files:
        hint = did_you_mean(name, files) or f"one of: {', '.join(files)}"
        raise UsageError(f"there is no shipped configuration {name!r}", hint)
    dest = dest or Path(f"{name}.yaml")
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


@config_verbs.command()
@imports
def schema(modules: tuple[str, ...]) -> int:
    """Prints the JSON schema that editors complete from."""
    import_user_modules(modules)
    from dist_train.config.load import json_schema

    print(json_schema(), end="")
    return EXIT_DONE


@config_verbs.command()
@imports
def reference(modules: tuple[str, ...]) -> int:
    """Prints every setting, as Markdown tables."""
    import_user_modules(modules)
    from dist_train.config.reference import reference

    print(reference(), end="")
    return EXIT_DONE


@config_verbs.command(cls=ConfigVerb)
def check(config: str, settings: tuple[str, ...]) -> int:
    """Reports every mistake, and runs nothing."""
    from dist_train.config.load import load

    loaded = load(config, settings)
    for warning in loaded.warnings:
        print(printable(f"warning: {warning}"))
    print(f"{config} is right: {', '.join(loaded.config.stages)} in {loaded.config.run_dir}")
    return EXIT_DONE
