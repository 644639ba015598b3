"""Runs the cells of one code version, one step at a time, as its parent says. A script; nothing imports it.

    python -P nightly_worker.py HOME PACKAGE...

The packages under test come from PYTHONPATH and may be of any version, also of one from before this file: so it
imports nothing of effbench but what plugins and users use (`effbench.apply`, the registries, a task's methods).
Requests are lines of JSON on stdin, answers lines of JSON on stdout; it ends when stdin does.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = 3  # steps of each cell before its first turn


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it closes stdin
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    cells: dict[int, Cell] = {}
    for line in sys.stdin:
        try:
            answer = respond(json.loads(line), cells)
        except Exception as error:
            answer = dict(error=in_one_line(error))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def respond(asked: dict[str, Any], cells: dict[int, Cell]) -> dict[str, Any]:
    match asked["do"]:
        case "start":
            return start(asked["threads"])
        case "build":
            cell = cells[asked["number"]] = Cell(asked["cell"], asked["seed"], asked["device"], asked["threads"])
            return dict(envelope=cell.envelope)
        case "step":
            return dict(seconds=cells[asked["number"]].step(asked["turn"]))
    raise ValueError(f"no such request: {asked['do']}")


def start(threads: int) -> dict[str, Any]:
    """Check that the code under test is the one that was asked for."""
    home = Path(sys.argv[1]).resolve()
    for name in sys.argv[2:]:
        found = importlib.util.find_spec(name)
        place = Path(found.origin).resolve() if found and found.origin else None
        if place is None or not place.is_relative_to(home):
            raise ImportError(f"{name} would be imported from {place}, not from the version under test")
    import torch

    import effbench

    if "effbench" in sys.argv[2:] and not Path(effbench.__file__).resolve().is_relative_to(home):
        raise ImportError(f"effbench comes from {effbench.__file__}, not from the version under test")
    torch.set_num_threads(threads)
    return dict(torch=torch.__version__, python=sys.version.split()[0])


class Cell:
    """A model and the batch that its steps take.

    Args:
        asked: task, backbone, method, batch and weights, as in `effbench.nightly_cells.Cell`.
    """

    def __init__(self, asked: dict[str, Any], seed: int, device: str, threads: int) -> None:
        import numpy as np
        import torch

        import effbench
        from effbench.records import Protocol
        from effbench.registry import backbones, tasks
        from effbench.task import DataRequest

        task = tasks.get(asked["task"])()
        family, _, name = asked["backbone"].partition(":")
        backbone = backbones.get(family)(name, asked["weights"] or None)
        size = backbone.image_size
        protocol = Protocol(image_size=size, train="none", timing_batch=asked["batch"], threads=threads, device=device)
        torch.manual_seed(seed)
        data = _data(asked["task"], task, DataRequest())
        prepared = task.prepare(data, backbone, protocol, lambda *progress: None)
        images = len(data.splits["test"])
        index = np.random.default_rng(seed).choice(images, asked["batch"], replace=asked["batch"] > images)
        batch = task.batch(prepared, "test", index, np.random.default_rng(seed), pixels=False)
        # decoding photos would take longer than all steps, and how fast they are decoded is not asked here
        noise = torch.Generator().manual_seed(seed)
        batch["image"] = torch.randn(asked["batch"], 3, size, size, generator=noise)
        torch.manual_seed(seed)
        model = task.build(task.recipe(prepared), backbone, protocol).to(device).eval().requires_grad_(False)
        if asked["method"] == "identity":
            effbench.apply(model, ())
        elif asked["method"] != "baseline":
            effbench.apply(model, asked["method"])
        self.model, self.task, self.seed, self.device = model.eval().requires_grad_(False), task, seed, device
        self.batch = {key: value.to(device) for key, value in batch.items()}
        self.envelope = dict(
            task=asked["task"],
            data=data.name,
            data_fingerprint=data.fingerprint,
            backbone=str(backbone),
            weights=backbone.weights_id,
            image_size=size,
            inputs=digest(batch),
            device=torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            threads=torch.get_num_threads(),
        )
        for turn in range(WARM_UP):
            self.step(turn)

    def step(self, turn: int) -> float:
        """Seconds of one test step, the device synchronised before and after."""
        import torch

        torch.manual_seed(self.seed + turn)
        cuda = self.device.startswith("cuda")
        gc.collect(0)
        gc.disable()
        try:
            with torch.inference_mode():
                if cuda:
                    torch.cuda.synchronize(self.device)
                begun = time.perf_counter()
                self.task.serve(self.model, self.batch)
                if cuda:
                    torch.cuda.synchronize(self.device)
                return time.perf_counter() - begun
        finally:
            gc.enable()


_loaded: dict[str, Any] = {}


def _data(name: str, task: Any, request: Any) -> Any:
    """The data of a task, read once for all of its cells."""
    if name not in _loaded:
        _loaded[name] = task.load(request)
    return _loaded[name]


def digest(batch: dict[str, Any]) -> str:
    """sha256 of a batch's names and bytes."""
    found = hashlib.sha256()
    for key in sorted(batch):
        found.update(key.encode())
        found.update(batch[key].contiguous().numpy().tobytes())
    return found.hexdigest()


def in_one_line(error: Exception) -> str:
    """An exception; the type's name is left out where the message is written for people."""
    text = " ".join(str(error).split())[:500]
    return text if type(error).__module__ == "effbench.errors" else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
