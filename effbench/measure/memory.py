"""Memory: bytes of weights, and peaks of an arm that is built and run in a process of its own.

A peak never falls, so each arm needs a fresh process. The operating system's peak is VmHWM, reset before the arm is
built (`ru_maxrss` is inherited from the parent and means nothing). The process is forked from a server that has only
imported the libraries: it starts in milliseconds where a spawned one imports for seconds, and its base is subtracted.
Beside it stands what the tensors themselves take (`tensor_memory`; on CUDA, torch's allocator and the driver).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import statistics
import sys
import threading
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from effbench.errors import EffbenchError, UsageError
from effbench.measure import nvidia
from effbench.measure.tensor_memory import STEPS, Step, held, living, storages, tensor_peak, weights
from effbench.records import Memory

LIBRARIES = ["torch", "timm", "open_clip", "effbench.measure.memory"]
MakeStep = Callable[..., Step]
M_MMAP_THRESHOLD, BLOCK = -3, 128 * 1024  # of glibc's mallopt; its own first value


class Unmeasurable(Exception):
    """This system keeps no peak that can be reset."""


def rss() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    return _status("VmRSS")


def process_peak() -> int:
    """Peak of the resident bytes of this process (VmHWM); 0 where the system does not say."""
    return _status("VmHWM")


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and packed quantised weights; what shares storage counts once."""
    return _bytes(storages(weights(model)))


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the model's state dict as torch.save writes it."""
    counted = _Counted()
    torch.save(model.state_dict(), counted)
    return counted.bytes


class _Counted(io.RawIOBase):
    """A file that keeps nothing but its length."""

    bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.bytes += len(data)
        return len(data)


def probe(
    make_step: MakeStep,
    *args: Any,
    device: str = "cpu",
    threads: int = 1,
    runs: int = 3,
    timeout: float = 600.0,
    start: str = "",
) -> tuple[Memory | None, str]:
    """Peak memory of an arm, each time in a fresh process.

    Args:
        make_step: a function of an importable module. In the fresh process `make_step(*args)` builds and loads the arm
            and returns a `Step`, which is taken twice (from the second on, Adam's state is there).
        args: what it takes; must pickle.
        device: on "cuda" the load peak and the run peak are what torch allocated on the device.
        threads: torch's threads there.
        runs: number of processes; each field is the median of theirs.
        timeout: seconds after which a process is killed.
        start: multiprocessing's start method; empty for the fastest of this platform.

    Returns:
        The memory in bytes above what the process held before the arm was built, and ""; or None and the reason why
        this system cannot measure it.

    Raises:
        UsageError: `make_step` or its arguments cannot be sent to another process.
        EffbenchError: the process failed, was killed (e.g. out of memory) or took longer than `timeout`.
    """
    found = []
    for _ in range(runs):  # one after the other: two at once might not fit
        figures, reason = _in_fresh_process(make_step, args, str(device), threads, timeout, start)
        if figures is None:
            return None, reason
        found.append(figures)
    return Memory(**{field: _median([figures[field] for figures in found]) for field in found[0]}, runs=runs), ""


def unmeasurable() -> str:
    """Why this system cannot measure peak memory; empty where it can."""
    try:
        _reset_peak()
    except Unmeasurable as reason:
        return str(reason)
    return ""


def prepare() -> None:
    """Have the server that forks the fresh processes import its libraries now, beside other work: it takes seconds."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(LIBRARIES)
        with _without_main():
            multiprocessing.forkserver.ensure_running()


def _in_fresh_process(
    make_step: MakeStep, args: tuple[Any, ...], device: str, threads: int, timeout: float, start: str
) -> tuple[dict[str, int | None] | None, str]:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context(start or ("forkserver" if "forkserver" in methods else "spawn"))
    if context.get_start_method() == "forkserver":
        prepare()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, make_step, args, device, threads), daemon=True)
    try:
        _start(process)
        sender.close()
        if not receiver.poll(timeout):
            raise EffbenchError(f"the memory probe took longer than {timeout:g} s", "a smaller batch, or leave it out")
        kind, *answer = receiver.recv()
    except EOFError:
        process.join(10)
        raise EffbenchError(f"the memory probe's process {_death(process.exitcode)}", "try a smaller batch") from None
    finally:
        receiver.close()
        if process.pid is not None:
            process.kill()
            process.join()
    if kind == "failed":
        raise EffbenchError(f"the memory probe failed: {answer[0]}", "run the arm alone to see where")
    return answer[0], answer[1]


def _median(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return statistics.median_low(known) if known else None


def _start(process: Any) -> None:
    with _without_main():
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"cannot be sent to a fresh process: {error}", "use functions of importable modules"
            ) from error


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide `__main__` from multiprocessing, which would run the user's script a second time."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child(sender: Connection, make_step: MakeStep, args: tuple[Any, ...], device: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent kills us; its Ctrl-C reaches the whole group
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with open(os.devnull, "w") as silence:
        for stream in (1, 2):
            os.dup2(silence.fileno(), stream)
    try:
        torch.set_num_threads(threads)
        measure = _device_growth if device.startswith("cuda") else _resident_growth
        sender.send(("measured", measure(make_step, args, device), ""))
    except Unmeasurable as reason:
        sender.send(("measured", None, str(reason)))
    except BaseException as error:
        sender.send(("failed", f"{type(error).__name__}: {error}"))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _resident_growth(make_step: MakeStep, args: tuple[Any, ...], _device: str) -> dict[str, int | None]:
    _return_freed_blocks()
    _touch_libraries()
    gc.freeze()  # spares the collector the libraries' objects: a third of a second each time
    before = living()
    base = rss()
    _reset_peak()
    step = make_step(*args)
    load_peak = process_peak()
    own = weight_bytes(step.model)
    peaks: list[int] = []
    tensors = tensor_peak(step, own, before, lambda: peaks.append(process_peak()))
    return dict(weights=own, load_peak=max(0, load_peak - base), run_peak=max(0, peaks[0] - base)) | tensors


def _device_growth(make_step: MakeStep, args: tuple[Any, ...], device: str) -> dict[str, int | None]:
    torch.cuda.set_device(device if ":" in device else "cuda:0")
    torch.cuda.reset_peak_memory_stats()
    step = make_step(*args)
    torch.cuda.synchronize()
    load_peak = torch.cuda.max_memory_allocated()
    own = weight_bytes(step.model)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        step.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    # what outlives a step is there at the peak of the next: it still has the gradients of the one before
    kinds = {kind: _bytes(found) if step.optimiser else None for kind, found in held(step).items()}
    return dict(
        weights=own,
        load_peak=load_peak,
        run_peak=max(load_peak, peak),
        tensor_peak=peak,
        activations=max(0, peak - own - sum(size or 0 for size in kinds.values())),
        reserved=torch.cuda.max_memory_reserved(),
        process=nvidia.process_memory(device),
        **kinds,
    )


def _return_freed_blocks() -> None:
    """Fix the size from which glibc gives a freed block back to the system.

    Left alone it grows with the blocks that were freed, and the process keeps holes: 354 MiB of tensors then took
    597 MiB, the next time 645 MiB (DeiT-tiny's text tower, a training step of 256), with it fixed 372 MiB each time.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK)


def _touch_libraries() -> None:
    """Run each kind of kernel once on next to nothing: its code and workspaces are not the arm's memory."""
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True, activation="gelu")
    patches = nn.Conv2d(3, 64, 4, stride=4)
    tokens = patches(torch.zeros(2, 3, 16, 16)).flatten(2).transpose(1, 2)
    layer(tokens).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    with torch.inference_mode():
        layer.eval()(tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        patches(torch.zeros(1, 3, 16, 16))


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        raise Unmeasurable(
            f"peak memory is not measured here: {error.strerror or error} (/proc/self/clear_refs)"
        ) from error


def _status(field: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:")), 0)
    except OSError:
        return 0


def _bytes(found: dict[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in found.values())


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; usually out of memory)"
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code} before it could report (can it import what it was given?)"
