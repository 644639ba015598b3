"""What `effbench doctor` says of the machine and of what can be measured on it."""

from types import SimpleNamespace

from effbench import doctor


def test_what_can_be_measured(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    found = {"cpu": (None, "energy is not measurable here: why"), "cuda:0": (SimpleNamespace(source="NVML"), "")}
    monkeypatch.setattr(doctor, "meter", found.get)
    monkeypatch.setattr("effbench.measure.memory.unmeasurable", lambda: "peak memory is not measured here: why")
    assert doctor._measuring() == [
        (doctor.NOTE, "peak memory is not measured here: why"),
        (doctor.NOTE, "energy is not measurable here: why"),
        (doctor.GOOD, "energy of cuda:0: NVML"),
    ]
    monkeypatch.setattr("effbench.measure.memory.unmeasurable", str)
    assert doctor._measuring()[0] == (doctor.GOOD, "peak memory: each arm in a fresh process")


def test_the_machine(monkeypatch):
    monkeypatch.setattr(doctor, "machine", lambda: dict(governor="powersave", limits="1.50 cores", load="x"))
    lines = doctor._machine()
    assert (doctor.NOTE, "governor: powersave; timings may be noisy") in lines
    assert (doctor.GOOD, "limits: 1.50 cores") in lines
    monkeypatch.setattr(doctor, "machine", lambda: dict(governor="performance"))
    assert (doctor.GOOD, "governor: performance") in doctor._machine()
