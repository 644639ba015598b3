"""What `effbench check` asks of a task: one function for each promise. See `effbench.conformance` for methods."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from inspect import getdoc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from effbench.conformance_model import Bed, TinyViT, captioning_of, seeded
from effbench.errors import DataNotFound, EffbenchError, UsageError
from effbench.models.backbones import Backbone
from effbench.outcomes import Fault, NotChecked
from effbench.pixels import open_image
from effbench.registry import Entry
from effbench.task import SPLITS, Data, DataRequest, Example, Items, Metric, Task, shown
from effbench.training import reduce

FEW = 24  # examples of each split that a model really sees
LOAD = """
import sys
from pathlib import Path
from effbench.registry import tasks
from effbench.task import DataRequest
data = tasks.get(sys.argv[1])().load(DataRequest(Path(sys.argv[2]) if sys.argv[2] else None))
print("fingerprint:", data.fingerprint)
"""


class Case:
    """A task.

    Args:
        entry: the plugin as its distribution announces it.
        task: an instance.
        data: `--data PATH`; None for the usual places.
        backbone: what its model is built on; None for a tiny ViT.
    """

    def __init__(
        self,
        entry: Entry,
        task: Task,
        data: Path | None = None,
        backbone: Backbone | None = None,
        progress: Callable[[str, int, int], None] = lambda description, done, total: None,
    ) -> None:
        self.entry = entry
        self.task = task
        self.path = data
        self.backbone = backbone
        self.progress = progress
        self._data: Data | DataNotFound | None = None
        self.content: dict[int, bytes] = {}  # of the examples by number, a hash of the pixels

    @property
    def data(self) -> Data:
        """As `load` finds it, read once.

        Raises:
            NotChecked: there is no copy on this machine.
        """
        if self._data is None:
            try:
                self._data = self.task.load(DataRequest(self.path))
            except DataNotFound as missing:
                self._data = missing
        if isinstance(self._data, DataNotFound):
            raise NotChecked("its data are not here")
        return self._data

    @property
    def missing(self) -> str:
        """Why there are no data."""
        return str(self._data) if isinstance(self._data, DataNotFound) else ""

    @property
    def examples(self) -> list[Example]:
        return [example for examples in self.data.splits.values() for example in examples]

    @cached_property
    def bed(self) -> Bed:
        """The task's own model, and a few examples of each split."""
        few = {split: [examples[i] for i in shown(len(examples), FEW)] for split, examples in self.data.splits.items()}
        small = replace(self.data, splits=few, apart={}, notes=[], fingerprint=f"{self.data.fingerprint} few")
        backbone = self.backbone or TinyViT("vit", "random", image_size=64)
        return Bed(str(backbone), self.task, small, backbone, captioning_of(self.task))


def documentation(case: Case) -> str:
    """Its class has a summary."""
    if not (getdoc(type(case.task)) or "").strip() or not type(case.task).__doc__:
        raise Fault("missing: a docstring of the class, whose first line lists show", "say what is asked, of what data")
    return case.entry.summary or "a summary"


def data_are_read(case: Case) -> str:
    """`load` gives the three splits, a name and a fingerprint."""
    try:
        data = case.data
    except NotChecked as reason:
        raise NotChecked(f"{reason}: {case.missing}") from None
    if not isinstance(data, Data):
        raise Fault(f"load gives {type(data).__name__}", "return effbench.task.Data(name, splits, fingerprint)")
    missing = [split for split in SPLITS if not data.splits.get(split)]
    if missing:
        raise Fault(f"no examples in {', '.join(missing)}", "give train, dev and test; dev chooses, test judges")
    if not data.name.strip() or not data.fingerprint.strip():
        raise Fault("the data have no name or no fingerprint", "the fingerprint is a hash of captions and pixels")
    wrong = [e for e in case.examples if not isinstance(e, Example)]
    if wrong:
        raise Fault(f"a split holds {type(wrong[0]).__name__}", "make each an effbench.task.Example(image, captions)")
    return f"{data.name}: {' / '.join(f'{len(data.splits[split]):,} {split}' for split in SPLITS)} images"


def captions_are_there(case: Case) -> str:
    """Every image has captions with words in them, and as many questions as answers, or none."""
    for split, examples in case.data.splits.items():
        for number, example in enumerate(examples):
            where = f"image {number} of {split} ({example.name or 'no name'})"
            if isinstance(example.captions, str):
                raise Fault(f"{where}: its captions are one text", "give a tuple: captions=(text,)")
            if not example.captions:
                raise Fault(f"{where} has no captions", "leave the image out, and say so in Data.notes")
            if any(not any(c.isalnum() for c in caption) for caption in example.captions):
                raise Fault(f"{where} has a caption without words", "leave the caption out, and say so in Data.notes")
            if example.questions and len(example.questions) != len(example.captions):
                raise Fault(
                    f"{where}: {len(example.questions)} questions, {len(example.captions)} answers", "pair them"
                )
    return f"{sum(len(example.captions) for example in case.examples):,} captions"


def images_decode(case: Case) -> str:
    """Every image is decoded."""
    count = 0
    for count, example in enumerate(case.examples, start=1):
        case.progress("decoding every image", count, len(case.examples))
        try:
            case.content[count] = hashlib.sha256(open_image(example).tobytes()).digest()
        except EffbenchError as error:
            raise Fault(str(error), "replace the image, or leave it out and say so in Data.notes") from error
    return f"{count:,} images"


def splits_are_disjoint(case: Case) -> str:
    """No image stands in two splits, by name or by its pixels."""
    seen: dict[Any, tuple[str, str]] = {}
    count = 0
    for split, examples in case.data.splits.items():
        for example in examples:
            count += 1
            title = example.name or f"an image of {split}"
            for key in filter(None, (case.content.get(count), example.name)):
                other, name = seen.setdefault(key, (split, title))
                if other != split:
                    raise Fault(
                        f"{title} of {split} is {name} of {other}", "what is tested may not be seen in training"
                    )
    if len(case.content) < count:
        return f"{count:,} images, by name alone, since not all decode"
    return f"{count:,} images"


def fingerprint_is_stable(case: Case) -> str:
    """The same data have the same fingerprint, read again and in another process."""
    first = case.data.fingerprint
    again = case.task.load(DataRequest(case.path)).fingerprint
    todo = "hash captions and pixels by hashlib: no hash(), no time, no path, no order of a folder"
    if again != first:
        raise Fault(f"read twice, the fingerprint is {first:.40} and {again:.40}", todo)
    environment = os.environ | dict(PYTHONHASHSEED="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    command = [sys.executable, "-c", LOAD, case.entry.name, str(case.path or "")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    last = (done.stdout.strip().splitlines() or [""])[-1].removeprefix("fingerprint: ")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("next: ")]
        raise Fault(f"load fails in another process: {(lines or ['it says nothing'])[-1]:.300}", todo)
    if last != first:
        raise Fault(f"in another process the fingerprint is {last:.40}, here it is {first:.40}", todo)
    return f"{first[:16]}, three times"


def examples_travel(case: Case) -> str:
    """Images and captions can be sent to another process."""
    for example in (examples[0] for examples in case.data.splits.values()):
        try:
            pickle.dumps(example)
        except Exception as error:
            raise Fault(
                f"{example.name or 'an example'} cannot be pickled: {error}",
                "let `image` be a Path, or functools.partial of a function of the module; no lambda",
            ) from error
    return "an example of each split"


def metrics_are_declared(case: Case) -> str:
    """Each metric says its direction, chance and ceiling; the primary one is among them."""
    said = []
    for split in ("dev", "test"):
        found = case.task.metrics(_prepared(case), split)
        names = [metric.name for metric in found]
        if not found or len(set(names)) < len(names):
            raise Fault(f"metrics of {split}: {', '.join(names) or 'none'}", "give one Metric for each name")
        for metric in found:
            _declared(metric, split)
        said = names
    named = case.task.primary if type(case.task).primary_metric is Task.primary_metric else ""
    primary = named or case.task.primary_metric(_prepared(case), "test").name
    if primary not in said:
        raise Fault(f"primary = {primary!r} is no metric of test", f"name one of {', '.join(said)}")
    return ", ".join(said)


def _declared(metric: Metric, split: str) -> None:
    if not isinstance(metric.higher_is_better, bool):
        raise Fault(f"{metric.name}: higher_is_better is {metric.higher_is_better!r}", "say True or False")
    for what, value in (("chance", metric.chance), ("ceiling", metric.ceiling)):
        if value is not None and not math.isfinite(value):
            raise Fault(f"{metric.name}: its {what} is {value}", "give a number, or None where it has none")
    if metric.chance is not None and metric.ceiling is not None:
        best = max if metric.higher_is_better else min
        if metric.chance == metric.ceiling:
            raise Fault(
                f"{metric.name} of {split}: chance is its ceiling, {metric.ceiling:g}", f"give {split} more examples"
            )
        if best(metric.chance, metric.ceiling) != metric.ceiling:
            direction = "higher" if metric.higher_is_better else "lower"
            raise Fault(
                f"{metric.name}: {direction} is better, yet chance is {metric.chance:g} and the ceiling "
                f"{metric.ceiling:g}",
                "mend the direction, the chance or the ceiling",
            )
    if metric.reduce not in ("mean", "median"):
        raise Fault(f"{metric.name}: reduce is {metric.reduce!r}", 'say "mean" or "median"')


def _prepared(case: Case) -> Any:
    """What the task prepares of a few examples.

    Raises:
        NotChecked: its model needs another backbone.
    """
    try:
        with _own_cache():
            return case.bed.prepared
    except UsageError as refused:
        raise NotChecked(f"{refused} (see --backbone)") from refused


def a_step_and_its_scores(case: Case) -> str:
    """A training step and a test of a few examples run: the loss is finite, and every metric finds its items."""
    with _own_cache():
        return _step_and_scores(case)


def _step_and_scores(case: Case) -> str:
    prepared, bed, task = _prepared(case), case.bed, case.task
    try:
        with seeded(0):
            model = task.build(bed.recipe, bed.backbone, bed.protocol)
    except UsageError as refused:
        raise NotChecked(f"{refused} (see --backbone)") from refused
    train = task.batch(prepared, "train", np.arange(_few(case, "train")), np.random.default_rng(0))
    with seeded(0):
        loss = task.loss(model, train)
        loss.backward()
    if loss.ndim or not torch.isfinite(loss):
        raise Fault(f"the training loss is {loss}", "return a finite scalar")
    if not any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()):
        raise Fault("the loss has no gradient in any parameter", "let it depend on what the model computes")
    model.eval()
    values, without = [], []
    for split in ("dev", "test"):
        batch = task.batch(prepared, split, np.arange(_few(case, split)), None)
        with seeded(0), torch.no_grad():
            outputs = task.look(model, batch) if split == "dev" else task.predict(model, batch)
        scores = task.score(prepared, split, outputs)
        for metric in task.metrics(prepared, split):
            if metric.items not in scores and type(task).groundwork is not Task.groundwork:
                without.append(metric.name)  # it may compare with the weights that all arms start from
            else:
                values.append(_value(metric, scores))
    more = f"; not without the groundwork of a run: {', '.join(without)}" if without else ""
    found = sum(value is not None for value in values)
    return f"loss {float(loss.detach()):.3g}; {found} metrics of dev and test have values{more}"


def _value(metric: Metric, scores: dict[str, Items]) -> float | None:
    if metric.items not in scores:
        if metric.optional:
            return None
        raise Fault(f"{metric.name} is computed from {metric.items!r}, which score does not give", "name what it gives")
    items = scores[metric.items]
    if len(items.values) != len(items.group):
        raise Fault(f"{metric.items}: {len(items.values)} values and {len(items.group)} groups", "one group per value")
    value = reduce(metric, items.values)
    if not math.isfinite(value):
        raise Fault(f"{metric.name} is {value} on a model with random weights", "score what is not finite as the worst")
    return value


def _few(case: Case, split: str) -> int:
    return case.bed.sizes[split]


@contextmanager
def _own_cache() -> Iterator[None]:
    """A cache that is thrown away: a few examples are no data set that anything else should find."""
    before = os.environ.get("EFFBENCH_CACHE")
    with TemporaryDirectory(prefix="effbench-check-") as folder:
        os.environ["EFFBENCH_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["EFFBENCH_CACHE"]
            else:
                os.environ["EFFBENCH_CACHE"] = before


CHECKS: tuple[Callable[[Case], str], ...] = (
    documentation,
    data_are_read,
    captions_are_there,
    images_decode,
    splits_are_disjoint,
    fingerprint_is_stable,
    examples_travel,
    metrics_are_declared,
    a_step_and_its_scores,
)
