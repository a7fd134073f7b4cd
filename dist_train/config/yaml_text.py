"""The YAML of configurations: the scalars of YAML 1.2, texts of a limited size, and values that read back equal."""

from __future__ import annotations

import re
from typing import Any

import yaml

from dist_train.untrusted import MOST_LEVELS

_MOST_VALUES = 10_000  # where each alias counts as what it stands for
_MOST_DIGITS = 100  # of a whole number: Python and JSON refuse 4,300

# The core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema). PyYAML implements YAML 1.1, where 1e-3 is
# a text and `no` a boolean.
TAG = "tag:yaml.org,2002:"
SCALARS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"^(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}


class BeyondSizes(yaml.YAMLError):
    """The text has more values or levels than a configuration, or longer numbers; at `line`, counted from 1."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = mark.line + 1


class Loader(yaml.SafeLoader):
    """Reads scalars by the core schema alone; refuses a text of too many values or levels while it reads it.

    An alias counts as all that it stands for, as plain data repeats it.
    """

    def __init__(self, text: bytes | str) -> None:
        super().__init__(text)
        self._read = self._open = 0  # nodes so far, and levels around the node that is being read
        self._extents: dict[int, tuple[int, int]] = {}  # id of a whole node -> its values and levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self._read += 1
        self._open += 1
        self._refuse(self._read, self._open, mark)
        node: Any = super().compose_node(parent, index)
        self._open -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag == TAG + "int" and len(node.value) > _MOST_DIGITS:
            raise BeyondSizes(f"has a number of {len(node.value):,} digits", mark)
        if not alias:
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in inside for part in pair] if isinstance(node, yaml.MappingNode) else inside
            # An alias of a node that is still open contains itself, which `Tree` reports.
            known = [self._extents.get(id(part), (0, 0)) for part in parts]
            values, levels = sum(each[0] for each in known), max((each[1] for each in known), default=0)
            self._extents[id(node)] = (values + 1, levels + 1)
            self._refuse(values + 1, levels + 1, mark)
        return node

    def _refuse(self, values: int, levels: int, mark: Any) -> None:
        if levels > MOST_LEVELS:
            raise BeyondSizes(f"has more than {MOST_LEVELS} levels", mark)
        if values > _MOST_VALUES:
            raise BeyondSizes(f"has more than {_MOST_VALUES:,} values", mark)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quote_odd_breaks(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Writes line breaks of Unicode escaped: PyYAML would fold them, and read back a space."""
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(TAG + "str", text, style=style)


_Dumper.add_representer(str, _quote_odd_breaks)
Loader.yaml_implicit_resolvers = {}  # without the inherited ones of YAML 1.1
for _kind, _pattern in SCALARS.items():
    Loader.add_implicit_resolver(TAG + _kind, _pattern, None)
    _Dumper.add_implicit_resolver(TAG + _kind, _pattern, None)


def to_yaml(value: Any, *, one_line: bool = False) -> str:
    """Returns JSON-like data as YAML, keys in their own order; it reads back equal under YAML 1.1 and 1.2."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=one_line, width=float("inf")
    )
    return text.removesuffix("\n").removesuffix("\n...") if one_line else str(text)


def comment_in(text: str) -> str:
    """Returns the first comment in a YAML text, or ""."""
    end = 0
    for token in yaml.scan(text):
        skipped = text[end : token.start_mark.index]  # white space and comments
        if "#" in skipped:
            return "#" + skipped.partition("#")[2].partition("\n")[0].rstrip()
        end = token.end_mark.index
    return ""
