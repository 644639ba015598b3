"""The machine, the software and the clock."""

import subprocess
import sys

import pytest

from effbench.errors import InvalidError
from effbench.measure import environment
from effbench.measure.clock import Clock


def test_imports_no_torch():
    code = (
        "import sys; from effbench.measure import environment as e; e.provenance(''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_provenance_names_what_ran():
    found = environment.provenance("effbench run")
    assert found.command == "effbench run" and "torch" in found.versions and found.python and found.platform
    assert environment.device_model("cpu").endswith(("core", "cores"))


def test_nothing_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "LIBRARIES", ("no_such_library",))
    (tmp_path / ".git").mkdir()
    assert environment.provenance("x" * 5000).versions == {}
    assert environment._commit(tmp_path) == ""
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "missing")
    assert environment.device_model("cpu").startswith(environment.platform.machine())


def test_timed_returns_result_and_seconds():
    ticks = iter([1.0, 3.5])
    assert Clock(timer=lambda: next(ticks)).timed(lambda: "done") == ("done", 2.5)


@pytest.mark.parametrize("ticks", [(2.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_a_broken_clock_is_an_error(ticks):
    reading = iter(ticks)
    with pytest.raises(InvalidError, match="clock"):
        Clock(timer=lambda: next(reading)).timed(lambda: None)
