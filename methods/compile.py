"""torch.compile: the blocks of each tower as one compiled graph, and the layers of a decoder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effbench.calibration_set import CalibrationSet
from effbench.errors import EffbenchError, UsageError
from effbench.method import Method, param
from effbench.models.tower import ModelView
from effbench_methods.algorithms.bf16_linear import unpack_layers, unpack_tower
from effbench_methods.algorithms.tower_parts import PARTS, captioner_parts, towers, towers_asked_for

GRAPHS = 24  # that a part may have, one per shape of its input; a run has about a dozen batch sizes


@dataclass(frozen=True)
class Compile(Method):
    """Compile the loop over each tower's blocks with torch.compile (TorchInductor), whole or not at all.

    What breaks the graph, or asks for more than 24 graphs, is an error: nothing runs uncompiled in silence. Every new
    batch size compiles in its first step, which a run times apart (`first_step`); Inductor's cache on disk makes it
    cheaper in the next process. A copy.deepcopy or pickle of a compiled model is an uncompiled one.

    Of a captioner the tower's blocks, the connector and the decoder are compiled. The decoder's graphs always take any
    number of texts and tokens: its cache grows with every word, and a graph for each length would be one for each word.
    One reads a prompt and one goes on from a cache, with masks as many again, and one more for a batch of 1. Its whole
    body is one graph: compiled layer by layer each layer would be a graph of its own, as its place in the cache is part
    of it. The head, a single product, and the choice of words stay as they are, as does an image tower in a whole model
    of transformers, whose blocks effbench does not run.
    """

    source = "Ansel et al., PyTorch 2, ASPLOS 2024, doi 10.1145/3620665.3640366"
    phases = ("test",)
    neutral = {}

    mode: str = param("default", "torch.compile's mode", choices=("default", "max-autotune-no-cudagraphs"))
    dynamic: bool = param(False, "one graph for all batch sizes, instead of one for each")
    target: tuple[str, ...] = param(PARTS, "parts of the model that are compiled", choices=PARTS)

    def finish(self, model: ModelView, calibration: CalibrationSet) -> None:
        import torch._inductor.config as inductor

        asked = towers_asked_for(model, self.target, "compile").values()
        others = {name: part for name, part in _others(model).items() if name in self.target}
        if not asked and not others:
            raise UsageError(
                f"compile: target={'/'.join(self.target)} names no part of this model whose loop effbench runs",
                "use target=connector/decoder",
            )
        for tower in asked:
            if (layout := getattr(tower.module, "layout", None)) is not None:
                raise UsageError(
                    f"compile: {layout.name} lays every batch of texts out in another shape, each a graph of its own",
                    "use compile:target=tower",
                )
        if why := unavailable():
            raise UsageError(f"compile: {why}", "leave compile out on this machine")
        mode = None if self.mode == "default" else self.mode
        inductor.compile_threads = 1  # worker processes would stand beside timed steps, and outlive the run
        for tower in asked:
            unpack_tower(tower)  # Inductor takes no weight in oneDNN's layout
            _compile(tower.loop, self.dynamic, mode)
        for name, part in others.items():
            unpack_layers(part)
            _compile(part, self.dynamic or name == "decoder", mode)

    def notes(self, model: ModelView) -> list[str]:
        loops = [(tower.name, tower.loop) for tower in towers(model).values()]
        said = []
        for name, loop in [*loops, *((type(part).__name__, part) for part in _others(model).values())]:
            compiled = loop._compiled_call_impl
            if isinstance(compiled, Compiled):
                said.append(f"{name}: {compiled.graphs} graphs compiled, in first steps of {compiled.seconds:.1f} s")
        return said


def _others(model: ModelView) -> dict[str, nn.Module]:
    """What is compiled of a captioner beside its tower."""
    return {name: part for name, part in captioner_parts(model).items() if name in ("connector", "decoder")}


def _compile(module: nn.Module, dynamic: bool, mode: str | None) -> None:
    """Let a module be compiled whole; nothing is before its first call."""
    module.compile(fullgraph=True, dynamic=dynamic, mode=mode, recompile_limit=GRAPHS, isolate_recompiles=True)
    module._compiled_call_impl = Compiled(module._compiled_call_impl)


class Compiled:
    """A compiled call that names its errors, and counts its graphs and the seconds of the calls that made them."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self.call = call
        self.graphs = 0
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        from torch._dynamo.utils import counters

        begun, before = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            result = self.call(*args, **kwargs)
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise EffbenchError(*_said(error)) from error
            raise
        if made := counters["stats"]["unique_graphs"] - before:
            self.graphs += made
            self.seconds += time.perf_counter() - begun
        return result


def _said(error: Exception) -> tuple[str, str]:
    """Message and hint of what torch.compile raised."""
    text = str(error)
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return (
            f"compile: more than {GRAPHS} graphs for one part: the shapes inside change from batch to batch",
            "use dynamic=true, or leave compile out of this stack",
        )
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    where = next((line.strip() for line in text.splitlines() if "Explanation:" in line), "")
    hint = "leave compile out of this stack, or leave a tower out with target="
    if "file too short" in text:  # a process was killed while it wrote
        hint = "delete Inductor's cache (TORCHINDUCTOR_CACHE_DIR): a file in it is damaged"
    return f"compile: {type(error).__name__}: {reason} {where}".rstrip(), hint


def unavailable() -> str:
    """Why nothing can be compiled here; empty where it can."""
    # it warns of a CUDA toolkit without a GPU, in the middle of a run's output
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import torch._dynamo.config as dynamo
    from torch._inductor.cpp_builder import get_cpp_compiler

    if dynamo.disable:
        return "torch.compile is switched off (TORCH_COMPILE_DISABLE or torch._dynamo.config.disable)"
    if dynamo.suppress_errors:
        return "torch._dynamo.config.suppress_errors would let a graph that fails run uncompiled in silence"
    try:
        get_cpp_compiler()
    except Exception:  # noqa: BLE001 - each platform has its own
        return "TorchInductor finds no C++ compiler; install g++, or name one in the variable CXX"
    return ""
