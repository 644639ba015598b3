"""FLOPs of a backbone's towers, with and without methods: what `effbench flops` shows."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effbench.calibration_set import CalibrationSet
from effbench.errors import EffbenchError, UsageError
from effbench.measure.analytic import AnalyticCount, analytic, disagreement
from effbench.measure.flops import FlopCount, flops
from effbench.measure.structure import parameters
from effbench.method import Method, TrainingPlan
from effbench.models.choose import choose
from effbench.models.tower import view


@dataclass(frozen=True)
class TowerFlops:
    """One tower's cost over the batch.

    Args:
        count: as dispatched.
        formulas: as the layers' formulas say.
        disagreement: one sentence where the two differ by more than 1 %, else "".
        parameters: their number.
    """

    count: FlopCount
    formulas: AnalyticCount
    disagreement: str
    parameters: int


@dataclass(frozen=True)
class Request:
    """What is counted.

    Args:
        backbone: FAMILY:NAME.
        weights: a file; "random" for none, which is enough where a method does not look at weights.
        image_size: side in pixels; None for the backbone's own.
        batch: images, and texts.
        train: a forward and a backward pass in training mode; else a forward pass.
    """

    backbone: str
    weights: Path | str = "random"
    image_size: int | None = None
    batch: int = 1
    train: bool = False


def count_towers(request: Request, methods: tuple[Method, ...] = ()) -> dict[str, TowerFlops]:
    """Count a backbone's towers, "image" and, where it brings one, "text" (at its context length).

    Tensors without values stand in for images, texts and weights where the model allows it; else it really runs.

    Args:
        methods: a stack; of it only those count that act in what is counted (see `acts`).

    Raises:
        UsageError: an unknown backbone, or a method that does not fit it.
        InvalidError: the weights are missing or do not fit.
    """
    found = {}
    for name, (tower, inputs) in _built(request, methods).items():
        try:
            found[name] = _count(tower, inputs, request.train, without_values=True)
        except (RuntimeError, ValueError, AssertionError, UsageError):
            # values decide what runs, or a kernel needs them
            found[name] = _run(name, *_built(request, methods)[name], request.train)
    return found


def acts(method: Method, train: bool) -> bool:
    """Whether a method is there in a training step (phase "train" or "both"), or in a test step ("test" or "both")."""
    return method.phase in (("train", "both") if train else ("test", "both"))


def total(towers: dict[str, TowerFlops]) -> FlopCount:
    """All towers together; layers are named TOWER.LAYER."""
    counts = {name: tower.count for name, tower in towers.items()}
    fields = ("dense_flops", "macs", "overhead_flops", "useful_flops", "low_bit_ops", "low_bit_macs")

    def merged(field: str) -> dict[str, int]:
        return {f"{tower}.{layer}": n for tower, count in counts.items() for layer, n in getattr(count, field).items()}

    return FlopCount(
        **{field: sum(getattr(count, field) for count in counts.values()) for field in fields},
        by_layer=merged("by_layer"),
        overhead_by_layer=merged("overhead_by_layer"),
        complete=all(count.complete for count in counts.values()),
        unknown_ops=tuple(sorted({op for count in counts.values() for op in count.unknown_ops})),
    )


def _built(request: Request, methods: tuple[Method, ...]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The library's own model, edited: its towers with their inputs."""
    with _QuickInitialisation() if request.weights == "random" else nullcontext():
        try:
            backbone, _ = choose(request.backbone, request.weights, image_size=request.image_size, single_use=True)
        except (AssertionError, ValueError) as error:
            raise UsageError(f"{request.backbone} cannot be made: {error}", "choose another --image-size") from error
        model = backbone.reference
        classes = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
        if classes and hasattr(model, "reset_classifier"):  # timm's classifier, which a dual encoder leaves out
            model.reset_classifier(classes)
    if not any(True for _ in model.parameters()):
        raise UsageError(
            f"{request.backbone} brings no tower that could be counted: its task builds the model",
            "count a model of your own in Python: effbench.flops(model, *inputs)",
        )
    side = backbone.image_size
    towers = {"image": (getattr(model, "visual", model), torch.zeros(request.batch, 3, side, side))}
    if backbone.has_text:
        context = getattr(model, "context_length", None) or model.text.context_length
        ids = torch.zeros(request.batch, context, dtype=torch.long)
        ids[:, -1] = getattr(model.text, "eos_id", None) or 1  # texts that end where the context does
        towers["text"] = (model.text, ids)
    with torch.random.fork_rng(devices=[]):
        _edit(model, towers, methods, request.train)
    return towers


def _edit(
    model: nn.Module, towers: dict[str, tuple[nn.Module, Tensor]], methods: tuple[Method, ...], train: bool
) -> None:
    acting = [method for method in methods if acts(method, train)]
    if not acting:
        return
    seen = view(model)
    calibration = _calibration(towers)
    for i, method in enumerate(acting):
        acting[i] = method if method.phase == "test" else method.settle(seen, calibration)
        acting[i].edit_model(seen)
    if not train:
        for method in acting:
            method.finish(seen, calibration)
        return
    plan = TrainingPlan(seen, [], [])
    for method in acting:
        method.edit_training(plan)
    plan.set_gradients()


def _calibration(towers: dict[str, tuple[nn.Module, Tensor]]) -> CalibrationSet:
    """Two inputs of each tower: enough to count what a method chooses by data that are not here."""

    def run(_: nn.Module, inputs: list[Tensor]) -> Tensor:
        outputs = [tower(each) for (tower, _), each in zip(towers.values(), inputs, strict=True)]
        return sum(output.square().mean() for output in outputs)

    examples = [inputs[:1] for _, inputs in towers.values()]
    pairs = [torch.randn(2, *x.shape[1:]) if x.is_floating_point() else x.repeat(2, 1) for x in examples]
    return CalibrationSet(lambda: iter([pairs]), 2**31, run, run, thrifty=True)


def _run(name: str, tower: nn.Module, inputs: Tensor, train: bool) -> TowerFlops:
    try:
        return _count(tower, inputs, train, without_values=False)
    except (RuntimeError, ValueError, AssertionError) as error:
        if "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise EffbenchError(
                f"not enough memory for the {name} tower on a batch of {len(inputs)}",
                "FLOPs grow in proportion with the batch: count a smaller --batch",
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the {name} tower cannot run on a batch of {len(inputs)}: {reason}", "try another --image-size or --batch"
        ) from error


def _count(tower: nn.Module, inputs: Tensor, train: bool, without_values: bool) -> TowerFlops:
    train = train and any(parameter.requires_grad for parameter in tower.parameters())
    masks: list[tuple[nn.Module, str, Tensor]] = []
    if without_values:
        masks = [(m, name, b) for m in tower.modules() for name, b in m._buffers.items() if b is not None and _masks(b)]
        tower, inputs = tower.to("meta"), inputs.to("meta")
    formulas = analytic(tower, inputs, train=train)
    for owner, name, mask in masks:  # what is useful depends on their values
        owner._buffers[name] = mask
    count = flops(tower, inputs, train=train)
    return TowerFlops(count, formulas, disagreement(count, formulas), parameters(tower))


def _masks(buffer: Tensor) -> bool:
    """Whether a buffer is an attention mask: boolean, or with -inf."""
    return buffer.dtype == torch.bool or buffer.is_floating_point() and bool(torch.isneginf(buffer).any())


class _QuickInitialisation(TorchFunctionMode):
    """Zeros instead of random numbers: FLOPs do not depend on them, and drawing them for a ViT-L takes seconds."""

    RANDOM = {f"{kind}{shape}_" for kind in ("", "kaiming_", "xavier_") for shape in ("normal", "uniform")}
    RANDOM |= {"trunc_normal_", "orthogonal_"}
    SHAPING = ("erfinv_", "mul_", "add_", "clamp_")  # what makes other distributions of uniform numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.RANDOM:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        if name in self.SHAPING and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))
