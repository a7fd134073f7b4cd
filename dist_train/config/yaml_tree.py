"""Reads YAML 1.2 into plain data, with the line or option of each value."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from dist_train.config.yaml_text import SCALARS, TAG, BeyondSizes, Loader, comment_in, to_yaml
from dist_train.errors import Problem, first_line
from dist_train.untrusted import read_at_most

MOST_BYTES = 256 * 2**10
"""The most bytes of a configuration."""
_SMALLER = "a configuration is smaller: put data into a file, and its path into data.args"

Place = tuple[str | int, ...]  # of a value in the tree: ("train", "optim", "lr"), ("data", "augment", 0)


def dotted(path: Iterable[str | int]) -> str:
    """Joins keys with dots: ("data", "augment", 0) -> "data.augment.0"."""
    return ".".join(str(key) for key in path)


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in a file that is a configuration.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else, or more than a configuration.
    """
    return settings_in(read_at_most(path, MOST_BYTES), str(path))


def settings_in(text: bytes, source: str) -> dict[str, Any]:
    """Returns the settings in the text of a configuration; raises ValueError as `read_settings`.

    source: names the text in messages.
    """
    tree = Tree()
    tree.read_text(text, source)
    if tree.problems:
        raise ValueError(tree.problems[0].message)
    return tree.values


def _item(key: str) -> str | int:
    """Returns the number of a list's item, where a key is one."""
    return int(key) if key.isdecimal() and len(key) < 10 else key


def _misfit(container: Any, key: str | int, at: Place) -> str:
    """Returns the reason why `key` cannot be set in the container at `at`; "" where it can."""
    if isinstance(container, list):
        if not isinstance(key, int):
            return f"{dotted(at)} is a list: name an item by its number, {dotted(at)}.0"
        count = len(container)
        return "" if key < count else f"{dotted(at)} has {count} item{'' if count == 1 else 's'}, counted from 0"
    return (
        "" if isinstance(container, dict) else f"{dotted(at)} is the single value {to_yaml(container, one_line=True)}"
    )


def _is_quoted(node: yaml.Node | None, text: str) -> TypeGuard[yaml.ScalarNode]:
    """Tells whether YAML reads the whole text as one text in quotes."""
    return isinstance(node, yaml.ScalarNode) and text[:1] == node.style == text[-1:] and text[:1] in ("'", '"')


@dataclass(frozen=True)
class TextType:
    """Type of a setting that is a text or a path.

    Attributes:
        optional: `null` and the empty text stand for none.
        or_collection: it may be a section or a list instead, written in YAML.
    """

    optional: bool = False
    or_collection: bool = False


@dataclass
class Tree:
    """The given settings, merged in order, with the source of each, and the mistakes found while reading."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Place, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def source_of(self, path: Place) -> str:
        """Returns the source of the value at `path`, or of the nearest section around it; "" where none is given."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.sources:
                return self.sources[path[:length]]
        return ""

    def sources_of_leaf(self, path: Place) -> str:
        """Returns the source of the setting at `path`, and the options that changed a part of it; else "default"."""
        own = [self.sources[path]] if path in self.sources else []
        inside = [source for at, source in self.sources.items() if at[: len(path)] == path and source.startswith("--")]
        return ", ".join(dict.fromkeys(own + inside)) or "default"

    def read_text(self, text: bytes, name: str) -> None:
        """Reads a file's text; `name` is the file's name in sources."""
        node = self._compose(text, name, lambda line: f"{name}:{line}")
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            self.problems.append(
                Problem(
                    name, "must consist of settings, `key: value`, at its top", f"{name}:{node.start_mark.line + 1}"
                )
            )
            return
        self.values = self._construct(node, (), lambda line: f"{name}:{line}", ())

    def set_option(
        self,
        option: str,
        text: str,
        default: Callable[[Place], Any],
        text_type: Callable[[Place], TextType | None] = lambda path: None,
    ) -> None:
        """Applies `--dotted.key TEXT`.

        Args:
            option: "--dotted.key".
            text: the value as typed.
            default: path -> default of a list that is not given itself.
            text_type: path -> type of a setting whose value is the text as typed; None where the value is YAML.
        """
        keys = option.removeprefix("--").split(".")
        if "" in keys:
            self.problems.append(Problem(option, "is not a dotted key", hint="for example --train.optim.lr 0.1"))
            return
        known = len(self.problems)
        place = tuple(map(_item, keys))
        value = self._typed(text, place, option, text_type(place))
        if len(self.problems) > known:
            return
        path: Place = ()
        container: Any = self.values
        for key, following in zip(keys, [*keys[1:], None], strict=True):
            step = _item(key) if isinstance(container, list) else key
            misfit = _misfit(container, step, path)
            if misfit:
                self.problems.append(Problem(".".join(keys), misfit, option))
                return
            path = (*path, step)
            if following is None:
                break
            if not isinstance(container, list) and container.get(step) is None:
                container[step] = (default(path) if following.isdecimal() else None) or {}
            container = container[step]
        self._forget(path)
        if isinstance(value, yaml.Node):
            value = self._construct(value, path, lambda line: option, ())
        container[path[-1]] = value
        self.sources[path] = option

    def remove(self, path: Place) -> None:
        """Removes a value, so that the rest can be validated."""
        *parents, last = path
        container: Any = self.values
        for key in parents:
            container = container[key]
        del container[last]

    def _forget(self, path: Place) -> None:
        for known in [known for known in self.sources if known[: len(path)] == path]:
            del self.sources[known]

    def _typed(self, text: str, place: Place, option: str, kind: TextType | None) -> yaml.Node | str | None:
        """Returns an option's value: the text as typed, None, or a node of YAML."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.problems.append(Problem(dotted(place), f"{text!a} is not UTF-8", option, "rename it"))
            return None
        if kind is None:
            return self._without_comments(text, place, option)
        if kind.optional and text in ("null", ""):
            return None
        try:
            node = yaml.compose(text, Loader=Loader)
        except yaml.YAMLError:
            return text
        if kind.or_collection and isinstance(node, yaml.CollectionNode):
            return self._without_comments(text, place, option)
        if _is_quoted(node, text):  # '"null"' is a text, and quotes that YAML needed before are none of the text
            return str(node.value)
        return text

    def _without_comments(self, text: str, place: Place, option: str) -> yaml.Node | None:
        node: yaml.Node | None = self._compose(text.encode(), dotted(place), lambda line: option)
        comment = comment_in(text) if node is not None or text.lstrip().startswith("#") else ""
        if comment:
            message = f"YAML would drop {comment!r} as a comment"
            quoted = (
                ""
                if isinstance(node, yaml.CollectionNode)
                else ": " + shlex.quote(json.dumps(text, ensure_ascii=False))
            )
            self.problems.append(Problem(dotted(place), message, option, f"leave it out, or quote the text{quoted}"))
        return node

    def _compose(self, text: bytes, place: str, source: Callable[[int], str]) -> Any:
        try:
            return yaml.compose(text, Loader=Loader)
        except BeyondSizes as error:
            self.problems.append(Problem(place, error.problem, source(error.line), _SMALLER))
            return None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or first_line(error)
            self.problems.append(
                Problem(
                    place, f"is not YAML: {reason}", source(mark.line + 1) if mark else "", "quote texts with : or #"
                )
            )
            return None

    def _construct(self, node: Any, path: Place, source: Callable[[int], str], around: tuple[int, ...]) -> Any:
        """Returns plain data of a node; keys stay texts, as JSON has no other keys."""
        here = source(node.start_mark.line + 1)
        self.sources.setdefault(path, here)
        if id(node) in around:
            self.problems.append(Problem(dotted(path), "contains itself", here))
            return None
        around = (*around, id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, (*path, i), source, around) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key, line = str(key_node.value), source(key_node.start_mark.line + 1)
                inside = (*path, key)
                if not isinstance(key_node, yaml.ScalarNode):
                    self.problems.append(Problem(dotted(path), "a key must be a single text", line))
                elif key in result:
                    first = self.sources[inside]
                    self.problems.append(Problem(dotted(inside), f"is given twice, first at {first}", line))
                else:
                    self.sources[inside] = line
                    result[key] = self._construct(value_node, inside, source, around)
            return result
        return self._scalar(node, path, here)

    def _scalar(self, node: Any, path: Place, here: str) -> Any:
        text = str(node.value)
        kind = node.tag.removeprefix(TAG)
        if kind == "str":
            return text
        if kind not in SCALARS or not SCALARS[kind].match(text):
            self.problems.append(Problem(dotted(path), f"{text!r} cannot have the YAML tag {node.tag}", here))
            return None
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
