"""Memory: bytes of weights, and peaks of an arm that is built and run in a process of its own.

A peak never falls, so each arm needs a fresh process. The operating system's peak is VmHWM, reset before the arm is
built (`ru_maxrss` is inherited from the parent and means nothing). The process is forked from a server that has only
imported the libraries: it starts in milliseconds where a spawned one imports for seconds, and its base is subtracted.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from effbench.errors import EffbenchError, UsageError
from effbench.records import Memory

LIBRARIES = ["torch", "timm", "open_clip", "effbench.measure.memory"]
MakeStep = Callable[..., tuple[Callable[[], object], int]]


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
    held = [*model.parameters(), *model.buffers(), *tree_leaves(model.state_dict())]
    storages = (tensor.untyped_storage() for leaf in held if isinstance(leaf, Tensor) for tensor in _plain(leaf))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def probe(
    make_step: MakeStep, *args: Any, device: str = "cpu", threads: int = 1, timeout: float = 600.0, start: str = ""
) -> tuple[Memory | None, str]:
    """Peak memory of an arm, in a fresh process.

    Args:
        make_step: a function of an importable module. In the fresh process `make_step(*args)` builds and loads the arm
            and returns `(step, weight_bytes)`; then `step()` is run twice.
        args: what it takes; must pickle.
        device: "cpu" counts resident bytes, "cuda" what torch allocated on the device.
        threads: torch's threads there.
        timeout: seconds after which the process is killed.
        start: multiprocessing's start method; empty for the fastest of this platform.

    Returns:
        The memory in bytes above what the process held before the arm was built, and ""; or None and the reason why
        this system cannot measure it.

    Raises:
        UsageError: `make_step` or its arguments cannot be sent to another process.
        EffbenchError: the process failed, was killed (e.g. out of memory) or took longer than `timeout`.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context(start or ("forkserver" if "forkserver" in methods else "spawn"))
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(LIBRARIES)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, make_step, args, str(device), threads), daemon=True)
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
    memory, reason = answer
    return (Memory(**memory) if memory else None), reason


def _start(process: Any) -> None:
    """Start the process without multiprocessing's own `__main__`: it would run the user's script a second time."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"cannot be sent to a fresh process: {error}", "use functions of importable modules"
        ) from error
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


def _resident_growth(make_step: MakeStep, args: tuple[Any, ...], _device: str) -> dict[str, int]:
    _touch_libraries()
    base = rss()
    _reset_peak()
    step, weights = make_step(*args)
    load_peak = process_peak()
    step()
    step()
    return dict(weights=weights, load_peak=max(0, load_peak - base), run_peak=max(0, process_peak() - base))


def _device_growth(make_step: MakeStep, args: tuple[Any, ...], device: str) -> dict[str, int]:
    torch.cuda.set_device(device if ":" in device else "cuda:0")
    torch.cuda.reset_peak_memory_stats()
    step, weights = make_step(*args)
    torch.cuda.synchronize()
    load_peak = torch.cuda.max_memory_allocated()
    step()
    step()
    torch.cuda.synchronize()
    return dict(weights=weights, load_peak=load_peak, run_peak=torch.cuda.max_memory_allocated())


def _touch_libraries() -> None:
    """Run each kind of kernel once on next to nothing: its code and workspaces are not the arm's memory."""
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True, activation="gelu")
    patches = nn.Conv2d(3, 64, 4, stride=4)
    tokens = patches(torch.zeros(2, 3, 16, 16)).flatten(2).transpose(1, 2)
    layer(tokens).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    with torch.inference_mode():
        layer.eval()(tokens)


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


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a quantised tensor is made of; any other is itself."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; usually out of memory)"
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code} before it could report (can it import what it was given?)"
