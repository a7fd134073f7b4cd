"""Loads a Config from a YAML file and `--dotted.key value` options; reports every mistake at once."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_train import registry
from dist_train.cluster.replicas import replica_folder, replica_number
from dist_train.config.advice import unexpanded_paths, unscaled_rates
from dist_train.config.checks.general import contradictions
from dist_train.config.messages import mistakes
from dist_train.config.shipped import shipped
from dist_train.config.text_settings import text_type
from dist_train.config.tree import Config, config_model, leaves
from dist_train.config.yaml_text import to_yaml
from dist_train.config.yaml_tree import MOST_BYTES, Place, TextType, Tree, dotted
from dist_train.errors import STOPS, ConfigError, Problem, advice, did_you_mean, told
from dist_train.untrusted import BeyondLimits, read_at_most


@dataclass(frozen=True)
class Loaded:
    """A checked configuration, with the source of each value.

    Attributes:
        config: the typed tree.
        sources: dotted key -> "configs/quickstart.yaml:12", "--train.optim.lr", or "default"; several with ", ".
        path: the file that was read.
        warnings: settings that are valid, but probably not meant.
    """

    config: Config
    sources: dict[str, str]
    path: Path
    warnings: tuple[Problem, ...] = ()


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Returns the checked configuration of a YAML file, or of a shipped name, with `overrides` applied.

    Args:
        path: a file, or the name of a shipped configuration ("quickstart").
        overrides: as on the command line: `["--train.optim.lr", "0.1", "--import", "my_models"]`.

    Raises:
        ConfigError: all mistakes at once, with their places.
    """
    return load(path, overrides).config


def load(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
    *,
    elsewhere: bool = False,
) -> Loaded:
    """Loads as `load_config` does, with the source of each value. `environ` is checked against the settings too.

    elsewhere: the run is to be on machines that may have other files and packages than this one.

    Raises:
        ConfigError: all mistakes at once, with their places.
    """
    tree = Tree()
    file = _read(path, tree)
    batch_of_file = _at(tree.values, ["data", "global_batch_size"], Config().data.global_batch_size)
    options, modules, wrong = split_options(overrides)
    tree.problems += wrong + import_modules(modules)
    for option, text in options:
        tree.set_option(option, text, _default_at, _text_type)
    config, bad = _validate(tree)
    if config is not None:
        for problem in contradictions(config, environ, bad):
            if elsewhere and problem.here:
                continue
            source = problem.source or tree.source_of(tuple(problem.place.split(".")))
            tree.problems.append(Problem(problem.place, problem.message, source, problem.hint))
    if config is None or tree.problems:
        raise ConfigError(tree.problems)
    config = _of_replica(config, environ)
    sources = {key: tree.sources_of_leaf(tuple(key.split("."))) for key, _, _ in leaves(config)}
    warnings = (*unscaled_rates(config, sources, batch_of_file), *unexpanded_paths(config, sources))
    return Loaded(config, sources, file, warnings)


def _of_replica(config: Config, environ: Mapping[str, str]) -> Config:
    """Gives each replica of a run under `strategy: ft` a run directory of its own within the run's."""
    number = replica_number(environ)
    if config.strategy != "ft" or number is None:
        return config
    base = Path(config.run.dir or Path("runs") / config.run.name)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": replica_folder(base, number)})})


def dump(config: BaseModel) -> str:
    """Returns the complete configuration as YAML; `load` of it gives an equal one."""
    return to_yaml(config.model_dump(mode="json"))


def differences(old: Mapping[str, Any], new: Config) -> list[Problem]:
    """Returns the settings that determine the result and differ from `old`, the config.yaml of a run directory.

    A field that `old` lacks has its default, and so has a known section that only `old` has. A field that this version
    does not know is reported, as its effect is unknown.
    """
    now = {key: (value, determines_result) for key, value, determines_result in leaves(new)}
    defaults = _defaults([*old, *type(new).model_fields])
    found = []
    for key, (_, determines_result) in {**defaults, **now}.items():
        if any(other.startswith(f"{key}.") for other in now):
            continue  # an optional section that is given: its settings are compared one by one
        default = defaults.get(key, (_ABSENT,))[0]
        recorded, value = _at(old, key.split("."), default), now.get(key, (default,))[0]
        if determines_result and recorded != value:
            found.append(Problem(key, f"was {_brief(recorded)}, is {_brief(value)}"))
    unknown = _unknown(old, set(defaults) | set(now))
    return found + [Problem(key, f"was {_brief(value)}, is unknown now") for key, value in unknown]


def import_modules(names: Sequence[str]) -> list[Problem]:
    """Imports the user's modules, which register names; the working directory comes first on sys.path."""
    problems = []
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except STOPS:
            raise
        except BaseException as error:  # the user's code may raise anything
            reason, hint = f"cannot be imported: {told(error, ours=False)}", advice(error)
            if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
                hint = "give the name of a module in the working directory, or of an installed one"
                problems.append(Problem(name, reason, "--import", hint))
            else:
                problems.append(Problem(name, reason, "--import", hint, error))
    return problems


def split_options(overrides: Sequence[str]) -> tuple[list[tuple[str, str]], list[str], list[Problem]]:
    """Splits the words after CONFIG into options (--dotted.key, text), modules to import, and mistakes."""
    options, modules, problems = [], [], []
    rest = list(overrides)
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        if not option.startswith("--") or option == "--":
            problems.append(Problem(option, "is not an option", hint="settings are given as --dotted.key VALUE"))
        elif option == "--fast-dev-run" and not equals:
            options.append(("--debug.fast_dev_run", "true"))
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(Problem(option, "has no value", hint=f"type {option} VALUE or {option}=VALUE"))
        else:
            text = text if equals else rest.pop(0)
            if option == "--import":
                modules.append(text)
            else:
                options.append((option, text))
    return options, modules, problems


def annotated(loaded: Loaded) -> str:
    """Returns the complete configuration as YAML, with the source of each value in a comment."""
    lines = list(_annotated(loaded.config, loaded.sources, ""))
    width = min(max(len(setting) for setting, _ in lines), 60)
    return "".join(f"{setting:<{width}}{source and '  # ' + source}".rstrip() + "\n" for setting, source in lines)


def _annotated(config: BaseModel, sources: Mapping[str, str], section: str) -> Iterator[tuple[str, str]]:
    indent = "  " * section.count(".")
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:", ""
            yield from _annotated(value, sources, f"{section}{name}.")
        else:
            value = config.model_dump(mode="json", include={name})[name]
            yield f"{indent}{name}: {to_yaml(value, one_line=True)}", sources[section + name]


def json_schema() -> str:
    """Returns the JSON schema of the configuration, with the sections of all registered stages, as text."""
    schema = config_model(registry.stages.names()).model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


_ABSENT = object()


def _brief(value: Any) -> str:
    return "not there" if value is _ABSENT else to_yaml(value, one_line=True)


def _at(values: Any, keys: Sequence[str], default: Any) -> Any:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return default
        values = values[key]
    return values


def _unknown(old: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in old.items():
        key = f"{prefix}{name}"
        if key in known:
            continue
        if isinstance(value, Mapping) and any(leaf.startswith(key + ".") for leaf in known):
            yield from _unknown(value, known, key + ".")
        else:
            yield key, value


def _defaults(sections: Sequence[str]) -> dict[str, tuple[Any, bool]]:
    """Returns all defaults, with the sections of the third-party stages among `sections`."""
    try:
        config = config_model(list(sections))()
    except ValidationError:  # a third-party section that must be given
        config = Config()
    return {key: (value, determines_result) for key, value, determines_result in leaves(config)}


def _default_at(place: Place) -> Any:
    """Returns the default of the list at `place`, for an option that changes one item of it, or None."""
    value = _at(Config().model_dump(mode="json"), [str(key) for key in place], None)
    return value if isinstance(value, list) else None


def _text_type(place: Place) -> TextType | None:
    """Returns how an option's text for the setting at `place` is read; None: as YAML."""
    try:
        model = config_model([str(place[0])])
    except (ImportError, AttributeError):  # `_validate` reports it
        model = Config
    return text_type(model, place)


def _read(path: str | os.PathLike[str], tree: Tree) -> Path:
    """Reads the named file, or the shipped configuration of that name, into the tree."""
    file, known = Path(path), shipped()
    if not file.is_file() and str(path) in known:
        file = known[str(path)]
    try:
        text = read_at_most(file, MOST_BYTES)
    except BeyondLimits as error:
        tree.problems.append(Problem(str(path), f"cannot be read: {error}", hint="give the configuration's own file"))
    except OSError as error:
        near = [str(name) for name in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        names = ", ".join(known) or "none"
        hint = did_you_mean(str(path), near + list(known)) or f"give a file, or a shipped configuration: {names}"
        tree.problems.append(Problem(str(path), f"cannot be read: {error.strerror}", hint=hint))
    else:
        tree.read_text(text, _from_here(file))
    return file


def _from_here(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)


def _validate(tree: Tree) -> tuple[Config | None, frozenset[str]]:
    """Returns the Config of the valid settings in the tree, and the dotted keys of the settings left out."""
    stages = tree.values.get("stages")
    named = [name for name in stages if isinstance(name, str)] if isinstance(stages, list) else []
    try:
        model = config_model([*named, *tree.values])
    except (ImportError, AttributeError) as error:  # of an installed package that offers a stage
        tree.problems.append(Problem("stages", f"a stage's settings cannot be imported: {error}", hint="reinstall it"))
        return None, frozenset()
    bad: set[Place] = set()
    while True:
        try:
            # Strict, and through JSON: a bool is not a number, a quoted number is a text, but a list may be a tuple.
            config = model.model_validate_json(json.dumps(tree.values), strict=True)
        except ValidationError as error:
            found = list(mistakes(error.errors(include_url=False), model, tree))
            # A place that only an earlier removal made invalid (a list that became empty) is no mistake of its own.
            tree.problems += [one.problem for one in found if not any(at[: len(one.place)] == one.place for at in bad)]
            removed = {one.cut for one in found}
            bad |= {place for one in found if one.known_key for place in (one.place, one.cut)}
            if () in removed:
                return None, frozenset()
            # From the end, so that the numbers of a list's earlier items stay true.
            for cut in sorted(removed, key=lambda at: [(isinstance(key, str), key) for key in at], reverse=True):
                if not any(cut[:length] in removed for length in range(1, len(cut))):
                    tree.remove(cut)
        else:
            return config, frozenset(map(dotted, bad))
