"""`effbench new method NAME` and `new task NAME`: a third party's package with one plugin that works, and its test."""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from string import Template

from effbench import scaffold_method, scaffold_task
from effbench.errors import EffbenchError, UsageError
from effbench.registry import methods, tasks
from effbench.spec import ALWAYS

SETUPTOOLS = 77  # what the packages' pyproject.toml asks for


#: pyproject.toml of a plugin; the files of a kind may add to it
PROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "$name, a $kind for effbench"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["effbench"]

[project.optional-dependencies]
test = ["pytest"]

# Every file of the package whose name does not start with "_" is a $kind, named as the file.
[project.entry-points."effbench.${kind}s"]
$name = "effbench_$name"

[tool.setuptools]
packages = ["effbench_$name"]
"""


def write_method(name: str, to: Path) -> Path:
    """Write the package `effbench-NAME` with a method into a folder of that name under `to` and return it.

    Raises:
        UsageError: the name is not one, is taken, or the folder exists.
    """
    return _write("method", name, to, scaffold_method.FILES)


def write_task(name: str, to: Path) -> Path:
    """Write the package `effbench-NAME` with a task and its data into a folder of that name under `to`.

    Raises:
        UsageError: the name is not one, is taken, or the folder exists.
    """
    folder = _write("task", name, to, scaffold_task.FILES)
    scaffold_task.draw_data(folder / f"effbench_{name}" / "data")
    return folder


def _write(kind: str, name: str, to: Path, files: dict[str, str]) -> Path:
    if not re.fullmatch(r"[a-z]([a-z0-9_]{0,38}[a-z0-9])?", name) or keyword.iskeyword(name):
        raise UsageError(
            f"{name[:60]!r} cannot name a {kind}", "use up to 40 lower-case letters, digits and _, e.g. half_depth"
        )
    if name in ALWAYS:
        raise UsageError(f"{name} is an arm of every run, and no {kind}", "choose another name")
    for other, registry in (("method", methods), ("task", tasks)):
        if name in registry.names():
            raise UsageError(f"there is a {other} {name} already", f"choose another name; effbench list {other}s")
    if find_spec(f"effbench_{name}") is not None:
        raise UsageError(f"there is a package effbench_{name} already", "choose another name")
    folder = Path(to).expanduser() / f"effbench-{name.replace('_', '-')}"
    if folder.exists():
        raise UsageError(f"{folder} exists and is not overwritten", "choose another name or another folder with --to")
    files = files | {"pyproject.toml": PROJECT + files.get("pyproject.toml", "")}
    title = name.title().replace("_", "")
    if keyword.iskeyword(title) or title in re.findall(r"\w+", "".join(files.values())):  # None; Data, which it imports
        title += kind.title()
    words = {"kind": kind, "name": name, "title": title, "distribution": folder.name}
    for path, text in files.items():
        file = folder / Template(path).substitute(words)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(words), encoding="utf-8")
    return folder


def install(folder: Path) -> str:
    """Install a package into the environment that effbench runs in, so that edits of its files count at once.

    Returns:
        the folder of that environment.

    Raises:
        EffbenchError: pip is missing or refuses; the files stay.
    """
    if find_spec("pip") is None:
        raise EffbenchError(f"wrote {folder}, but there is no pip to install it with", f"uv pip install -e {folder}")
    # nothing is fetched where setuptools is here; effbench, its one dependency, is running
    alone = ["--no-build-isolation"] if _setuptools() >= SETUPTOOLS else []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *alone]
    done = subprocess.run([*command, "--editable", str(folder)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if "error" in line.lower())[:300]
        raise EffbenchError(
            f"wrote {folder}, but pip could not install it: {said or done.stderr.strip()[-300:]}",
            f"pip install -e {folder}, in an environment of your own that has effbench",
        )
    return sys.prefix


def _setuptools() -> int:
    """The major version of setuptools here; 0 without."""
    try:
        return int(version("setuptools").partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return 0
