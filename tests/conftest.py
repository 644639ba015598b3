"""What several test files share. No test writes into the user's cache."""

import importlib
import sys
from pathlib import Path

import pytest

from effbench.cli import share_cores

share_cores()  # before torch is imported, as the command line does


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("EFFBENCH_JAVA", "")  # METEOR takes seconds to start


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Install a distribution on the path of this process: its files, and its entry points by group."""
    made = set()

    def install(name: str, files: dict[str, str], points: dict[str, dict[str, str]]) -> Path:
        site = tmp_path / f"site-{name}"
        for path, text in files.items():
            file = site / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            made.add(path.partition("/")[0].removesuffix(".py"))
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in all.items()) for group, all in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()
        return site

    yield install
    for module in [module for module in sys.modules if module.partition(".")[0] in made]:
        del sys.modules[module]
