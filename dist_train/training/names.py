"""Names of a model's parameters and modules, and the patterns that match them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.config.fit import Match, TypeMatch
from dist_train.errors import Problem, ask_for, nearest


class Names:
    """Names of the float model's parameters and modules."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.trained = frozenset(name for name, each in self.parameters.items() if each.requires_grad)
        self.batch_norms = [name for name, module in self.modules.items() if isinstance(module, _BatchNorm)]

    def matched(self, pattern: Match) -> tuple[set[str], set[str]]:
        """Returns the parameters and the modules that a pattern matches, with all inside a matched module."""
        top = self.top(pattern)
        modules = {name for name in self.modules if any(each in top for each in around(name))}
        parameters = {
            name
            for name in self.parameters
            if any(each in top for each in around(name.rpartition(".")[0]))
            or (isinstance(pattern, str) and fnmatch.fnmatchcase(name, pattern))
        }
        found = {id(self.parameters[name]) for name in parameters}
        return {name for name, each in self.parameters.items() if id(each) in found}, modules

    def top(self, pattern: Match) -> set[str]:
        """Returns the modules that a pattern matches by themselves."""
        return {name for name in self.modules if self._is(name, pattern)}

    def _is(self, name: str, pattern: Match) -> bool:
        if isinstance(pattern, TypeMatch):
            return any(fnmatch.fnmatchcase(kind, pattern.type) for kind in _types(self.modules[name]))
        return fnmatch.fnmatchcase(name, pattern)

    def patterns_of(self, chosen: Sequence[str]) -> list[str]:
        """Returns patterns, as YAML, that match these parameters and no other: of a class, else of a name's end."""
        left, found = list(chosen), list[str]()
        while left:
            module, _, last = left[0].rpartition(".")
            kind = type(self.modules[module]).__name__
            patterns: list[tuple[Match, str]] = [(TypeMatch(type=kind), f"{{type: {kind}}}")] if module else []
            patterns += [(f"*.{last}", f'"*.{last}"'), (left[0], f'"{left[0]}"')]
            text, own = next(
                (
                    (text, own)
                    for match, text in patterns
                    if left[0] in (own := self.matched(match)[0]) and own <= set(chosen)
                ),
                (f'"{left[0]}"', {left[0]}),
            )
            found.append(text)
            left = [name for name in left if name not in own]
        return found

    def cannot_be_block(self, name: str) -> str:
        """Returns why fully_shard cannot take a module by itself; "" if it can."""
        module = self.modules[name]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return f"a {type(module).__name__} is not called, its modules are"
        own = {id(each) for each in module.parameters()}
        if not own:
            return "it has no parameters"
        for other, parameter in self.parameters.items():
            if id(parameter) in own and name not in around(other):
                return f"it shares a parameter with {other}"
        return ""

    def exceeds(self, name: str, size: int) -> bool:
        """Tells whether a module can be a block, with more parameters than `size`."""
        large = sum(each.numel() for each in self.modules[name].parameters()) > size
        return large and not self.cannot_be_block(name)

    def all_frozen(self, name: str, frozen: set[str]) -> bool:
        own = [f"{name}.{each}".removeprefix(".") for each, _ in self.modules[name].named_parameters(recurse=False)]
        return bool(own) and frozen.issuperset(own)

    def unknown(self, place: str, pattern: Match, what: str) -> Problem:
        if isinstance(pattern, TypeMatch):
            known: Sequence[str] = sorted({kind for module in self.modules.values() for kind in _types(module)})
            near = [f"{{type: {kind}}}" for kind in nearest(pattern.type, known, 3) or known[:5]]
            return Problem(place, f"{{type: {pattern.type}}} matches no {what}", hint=ask_for(near))
        known = [name for name in (*self.modules, *self.parameters) if name]
        ending = ".*" if pattern.endswith(".*") else ""
        bases = [name for name in self.modules if name] if ending else known
        near = [name + ending for name in nearest(pattern.removesuffix(".*"), bases, 3) or bases[:5]]
        return Problem(place, f"{pattern!r} matches no {what} of the model", hint=ask_for(near))


def around(name: str) -> Iterator[str]:
    """Yields a module's name and those of the modules around it, up to the model, ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _types(module: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
