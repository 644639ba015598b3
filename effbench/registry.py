"""Methods, tasks, backbones and presets by name, built-in or not: one lazy registry over entry points.

    [project.entry-points."effbench.methods"]
    mine = "my_package"          # a package: every file in it is a plugin, named as the file
    mine = "my_module"           # a module: one plugin, named `mine`
    mine = "my_module:MyMethod"  # a class: one plugin, named `mine`

Names and summaries are read from the files, so that listing imports no plugin; `get` imports just one.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from effbench.errors import EffbenchError, UsageError


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution announces it.

    Args:
        name: what users call it.
        distribution: the installed distribution that brings it.
        module: dotted name of the module to import.
        attribute: the class in it; empty for the one subclass of the registry's base that the module defines.
        file: the module's source; None where it was not found.
        misfit: why it cannot be used, as far as names tell.
    """

    name: str
    distribution: str
    module: str
    attribute: str = ""
    file: Path | None = None
    misfit: str = ""

    @cached_property
    def _tree(self) -> ast.Module | str:
        """The parsed source, or why there is none."""
        if self.file is None or self.file.suffix != ".py":
            return f"module {self.module} not found"
        try:
            return ast.parse(self.file.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    @property
    def problem(self) -> str:
        """Why it cannot be used, as far as can be told without importing it; empty when nothing is known."""
        return self.misfit or (self._tree if isinstance(self._tree, str) else "")

    @property
    def summary(self) -> str:
        """First line of the docstring of the plugin's class, or else of its module."""
        if isinstance(self._tree, str):
            return ""
        classes = [node for node in self._tree.body if isinstance(node, ast.ClassDef) and node.bases]
        if self.attribute:
            named = [node for node in classes if node.name == self.attribute]
        else:
            named = classes if len(classes) == 1 else []
        for node in (*named, self._tree):
            if text := ast.get_docstring(node):
                return text.splitlines()[0]
        return ""


class Registry:
    """The plugins of one entry-point group.

    Args:
        group: e.g. "effbench.methods".
        kind: what one is called in messages, e.g. "method".
        base: the class that plugins subclass, as "module:Class"; imported by the first `get`.
    """

    def __init__(self, group: str, kind: str, base: str) -> None:
        self.group = group
        self.kind = kind
        self.base = base

    def entries(self) -> list[Entry]:
        """All plugins, by name, those with a problem included. Imports none of them."""
        found = [entry for point in entry_points(group=self.group) for entry in _entries(point)]
        return sorted(found, key=lambda entry: (entry.name, entry.distribution))

    def names(self) -> list[str]:
        """The names of all plugins, sorted."""
        return sorted({entry.name for entry in self.entries()})

    def get(self, name: str) -> type:
        """The class of that name; only its module is imported.

        Raises:
            UsageError: there is no such plugin, or two distributions bring one.
            EffbenchError: the plugin cannot be imported or is not a subclass of the base.
        """
        entry = self._entry(name)
        where = f"{self.kind} {name} (from {entry.distribution})"
        repair = f"repair or uninstall {entry.distribution}; everything else works without it"
        if entry.misfit:
            raise EffbenchError(f"{where} cannot be used: {entry.misfit}", repair)
        try:
            module = importlib.import_module(entry.module)
        except (Exception, SystemExit) as error:
            raise EffbenchError(f"{where} fails to import: {type(error).__name__}: {error}", repair) from error
        base_module, base_name = self.base.split(":")
        base = getattr(importlib.import_module(base_module), base_name)
        if entry.attribute:
            found = [getattr(module, entry.attribute, None)]
        else:
            found = [x for x in vars(module).values() if _is_subclass(x, base) and x.__module__ == entry.module]
        if len(found) != 1 or not _is_subclass(found[0], base):
            seen = "" if entry.attribute else f", found {', '.join(x.__name__ for x in found) or 'none'}"
            asked = f"{entry.attribute} is not a" if entry.attribute else "a plugin's module defines one"
            raise EffbenchError(f"{where} is wrong: {asked} subclass of {base_module}.{base_name}{seen}", repair)
        return found[0]

    def name_of(self, plugin: type) -> str:
        """The name under which a class is registered, else the class's own name."""
        for entry in self.entries():
            if entry.module == plugin.__module__ and entry.attribute in ("", plugin.__name__):
                return entry.name
        return plugin.__name__

    def _entry(self, name: str) -> Entry:
        entries = self.entries()
        found = [entry for entry in entries if entry.name == name]
        if not found:
            names = [entry.name for entry in entries]
            raise UsageError(f"unknown {self.kind} {name!r}{did_you_mean(name, names)}", f"effbench list {self.kind}s")
        if len(found) > 1:
            both = " and ".join(entry.distribution for entry in found)
            raise UsageError(f"{self.kind} {name} is brought by {both}", "uninstall one of them")
        return found[0]


def did_you_mean(name: str, names: list[str]) -> str:
    """`; did you mean ...?` for the names that are close, or an empty string."""
    close = get_close_matches(name, names, n=3) or [each for each in names if name and each.startswith(name)][:3]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _is_subclass(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _entries(point: EntryPoint) -> Iterator[Entry]:
    """What one entry point stands for."""
    distribution = point.dist.name if point.dist else "unknown"
    spec = _find(point.module)
    folders = list(spec.submodule_search_locations or ()) if spec and not point.attr else []
    if not folders:
        file = Path(spec.origin) if spec and spec.origin else None
        yield Entry(point.name, distribution, point.module, point.attr or "", file, _misfit(point.name))
    for file in sorted(file for folder in folders for file in Path(folder).glob("[!_]*.py")):
        yield Entry(file.stem, distribution, f"{point.module}.{file.stem}", "", file, _misfit(file.stem))


def _misfit(name: str) -> str:
    return "" if name.isascii() and name.isidentifier() else f"{name!r} is not a name (letters, digits and _)"


def _find(module: str) -> ModuleSpec | None:
    """Where a module lies, without importing it or the packages that it is in."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
        for name in rest:
            spec = spec and PathFinder.find_spec(f"{spec.name}.{name}", spec.submodule_search_locations or [])
    except (ImportError, ValueError):
        return None
    return spec


methods = Registry("effbench.methods", "method", "effbench.method:Method")
tasks = Registry("effbench.tasks", "task", "effbench.task:Task")
backbones = Registry("effbench.backbones", "backbone", "effbench.models.backbones:Backbone")
presets = Registry("effbench.presets", "preset", "effbench.preset:Preset")
