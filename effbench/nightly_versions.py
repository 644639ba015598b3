"""Two versions of the code side by side: each in a git worktree of its own, importable by a process of its own.

The user's checkout is never touched. A version's packages are found as setuptools would install them, and its entry
points come from its own pyproject.toml, so that a version announces the methods that it has, not those installed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.errors import InvalidError, UsageError

NO_PACKAGES = {"setup.py", "conftest.py", "noxfile.py"}


@dataclass(frozen=True)
class Version:
    """A code version that processes can run.

    Attributes:
        said: what a person calls it, e.g. `main (0123abcd)`.
        commit: its full hash, ending in `-dirty` where uncommitted changes are in it.
        home: its tree.
        path: the folder to put first on PYTHONPATH.
        packages: importable names that must come from `home`.
    """

    said: str
    commit: str
    home: Path
    path: Path
    packages: tuple[str, ...]


@contextmanager
def checked_out(repository: Path, reference: str, head: str | None) -> Iterator[tuple[Version, Version]]:
    """Base and head in worktrees below a temporary folder, which are gone afterwards, also on Ctrl-C.

    Args:
        repository: any folder of it.
        reference: the base, as git names it.
        head: likewise; None for the working tree as it is now, with changes that are not committed and new files.

    Raises:
        UsageError: there is no repository, or no such commit. InvalidError: a version cannot be installed.
    """
    root = Path(_git(repository, "rev-parse", "--show-toplevel"))
    names = {"base": reference, "head": "HEAD" if head is None else head}
    commits = {role: _commit(root, name) for role, name in names.items()}
    folder = Path(tempfile.mkdtemp(prefix="effbench-gate-"))
    try:
        versions = []
        for role, commit in commits.items():
            home = folder / role
            _git(root, "worktree", "add", "--quiet", "--detach", str(home), commit)
            said, full = f"{names[role]} ({commit[:10]})", commit
            if role == "head" and head is None:
                changed = _copy_changes(root, home)
                said = f"the working tree ({commit[:10]}{' and changes' if changed else ''})"
                full += "-dirty" if changed else ""
            versions.append(_importable(said, full, home, folder / f"{role}-packages"))
        yield versions[0], versions[1]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(
            ["git", "-C", str(root), "worktree", "prune"], capture_output=True, start_new_session=True, check=False
        )


def _commit(root: Path, name: str) -> str:
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except UsageError:
        raise UsageError(f"git knows no commit {name!r} in {root}", "git log --oneline tells the commits") from None


def _git(folder: Path, *arguments: str) -> str:
    """What git says.

    Raises:
        UsageError: git fails, e.g. outside a repository.
    """
    # a session of its own: Ctrl-C must not stop git halfway
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, start_new_session=True
        )
    except FileNotFoundError:
        hint = "install it: two code versions are compared by their commits"
        raise InvalidError("git is not installed", hint) from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-300:] or f"exit code {error.returncode}"
        raise UsageError(f"git {arguments[0]} failed in {folder}: {said}", "run it inside a git repository") from None
    return done.stdout.strip("\n")


def _copy_changes(root: Path, home: Path) -> bool:
    """Bring a worktree of HEAD to what the working tree holds; files that git ignores stay behind.

    Returns:
        whether anything differed.
    """
    status = _git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--no-renames")
    names = [entry[3:] for entry in status.split("\0") if entry]
    there = [name for name in names if (root / name).is_symlink() or (root / name).is_file()]
    for name in names:  # all of them first: a folder may stand where a file was, and a file where a folder was
        if (home / name).is_symlink() or (home / name).is_file():
            (home / name).unlink()
    for name in there:
        target = home / name
        if target.is_dir():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target, follow_symlinks=False)
    return bool(names)


def _importable(said: str, commit: str, home: Path, path: Path) -> Version:
    """Links to a version's packages, and metadata with its entry points, in `path`."""
    try:
        facts = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))
        project = facts["project"]
        name = project["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidError(
            f"{said} has no pyproject.toml that names a project: {error}", "choose a later commit"
        ) from None
    packages = _packages(home, facts.get("tool", {}).get("setuptools", {}))
    path.mkdir()
    for package, place in packages.items():
        (path / package).with_suffix(place.suffix).symlink_to(place)
    information = path / f"{name.replace('-', '_')}-{project.get('version', '0')}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {project.get('version', '0')}\n", encoding="utf-8"
    )
    lines = []
    for group, points in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items()), ""]
    (information / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return Version(said, commit, home, path, tuple(sorted(packages)))


def _packages(home: Path, setuptools: dict[str, Any]) -> dict[str, Path]:
    """Top-level packages and modules by name: those that package-dir maps, else what lies at the top or below src."""
    mapped = {
        name: home / place for name, place in setuptools.get("package-dir", {}).items() if name and "." not in name
    }
    found = {name: place for name, place in mapped.items() if place.is_dir()}
    top = home / "src" if (home / "src").is_dir() else home
    for place in sorted(top.iterdir()):
        package = place.is_dir() and (place / "__init__.py").is_file()
        module = place.is_file() and place.suffix == ".py" and place.name not in NO_PACKAGES
        if (package or module) and place.stem.isidentifier() and place not in mapped.values():
            found.setdefault(place.stem, place)
    return found


def environment(version: Version) -> dict[str, str]:
    """What a process of that version runs in: its packages before all others."""
    others = os.environ.get("PYTHONPATH", "")
    found = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(version.path), others])))
    if "OMP_WAIT_POLICY" not in found:
        found.setdefault("GOMP_SPINCOUNT", "2000")  # as `effbench.cli.share_cores` does
    return found
