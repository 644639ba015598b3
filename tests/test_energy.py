"""Energy counters: the right sum, across their wrap-around, and why there is none."""

import sys
import types

import pytest

from effbench.errors import EffbenchError
from effbench.measure import energy
from effbench.measure.energy import Counter, Meter, meter

RANGE = 262_143_328_850


def zone(root, name, label, value, span=RANGE):
    folder = root / name
    folder.mkdir()
    for file, text in dict(name=label, energy_uj=value, max_energy_range_uj=span).items():
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


@pytest.fixture
def sockets(tmp_path):
    """Two packages with cores inside, DRAM beside one, and the domains that would count something twice."""
    return {
        "package-0": zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        "core": zone(tmp_path, "intel-rapl:0:0", "core", 500_000),
        "dram": zone(tmp_path, "intel-rapl:0:1", "dram", 0),
        "package-1": zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 1_000_000),
        "psys": zone(tmp_path, "intel-rapl:2", "psys", 0),
        "mmio": zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0),
    }


def test_packages_and_dram_are_summed_once(sockets, tmp_path):
    found, why = meter("cpu", tmp_path)
    assert why == "" and found.source == "RAPL: package-0, dram, package-1"
    assert found.joules() == 0
    for name, value in {"package-0": 3_000_000, "core": 9_000_000, "dram": 250_000, "psys": 7, "mmio": 7}.items():
        sockets[name].write_text(str(value))
    assert found.joules() == pytest.approx(2.25)
    assert found.joules() == pytest.approx(2.25)


def test_a_counter_that_starts_again(sockets, tmp_path):
    found, _ = meter("cpu", tmp_path)
    sockets["package-1"].write_text("500000")
    assert found.joules() == pytest.approx(1.5)
    sockets["package-1"].write_text("700000")
    assert found.joules() == pytest.approx(1.7)
    sockets["package-1"].write_text("600000")
    assert found.joules() == pytest.approx(1.6 + RANGE / 1e6)


def test_no_counters(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        found, why = meter("cpu", place)
        assert found is None and "no RAPL counters under" in why and "virtual machine" in why


def test_only_root_may_read(sockets, tmp_path, monkeypatch):
    def refuses(path, limit):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, limit)

    real = energy.read
    monkeypatch.setattr(energy, "read", refuses)  # the tests may run as root, who may read anything
    found, why = meter("cpu", tmp_path)
    assert found is None and "only root may read" in why and "chmod a+r" in why


@pytest.mark.parametrize("garbage", [b"", b"lots", b"-5", b"\xff\xfe", b"1e9", b"9" * 1000])
@pytest.mark.parametrize("file", ["energy_uj", "max_energy_range_uj"])
def test_garbage_is_no_counter(sockets, tmp_path, garbage, file):
    (tmp_path / "intel-rapl:1" / file).write_bytes(garbage)
    found, why = meter("cpu", tmp_path)
    assert found is None and "intel-rapl:1" in why and "\n" not in why


def test_a_counter_that_breaks_later(sockets, tmp_path):
    found, _ = meter("cpu", tmp_path)
    sockets["dram"].write_text("garbage")
    with pytest.raises(EffbenchError, match="energy can no longer be read"):
        found.joules()
    readings = iter([5, 4])
    with pytest.raises(EffbenchError, match="stepped back"):
        Meter("x", [Counter("x", lambda: next(readings), 1.0)]).joules()


def test_nvml(monkeypatch):
    millijoules = iter([10_000, 10_000, 12_500])
    fake = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: "gpu",
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: types.SimpleNamespace(uuid="GPU-1"))
    found, why = meter("cuda:0")
    assert why == "" and found.source.startswith("NVML") and found.joules() == pytest.approx(2.5)
    del fake.nvmlDeviceGetTotalEnergyConsumption
    assert meter("cuda:0")[0] is None and "keeps no energy counter" in meter("cuda:0")[1]
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert meter("cuda:0")[0] is None and "nvidia-ml-py" in meter("cuda:0")[1]
