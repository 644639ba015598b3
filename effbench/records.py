"""The result schema: what one experiment leaves on disk. Read without torch; files from elsewhere are untrusted.

A record is one directory: `record.json` (this schema) and `samples.parquet` (raw samples: per-step times and
per-item scores). It is written atomically and never changed.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

SCHEMA_VERSION = 2
LEAST_SEEDS = 3  # of arms that were trained apart; fewer allow no claim about them

Text = Annotated[str, Field(max_length=4000)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Captioning(Model):
    """What a captioning task adds to the protocol: the language model, how it came to be, and how it writes."""

    decoder: Text = Field("tiny", description="tiny, hf:PATH_OR_NAME, or `own` of a whole vision-language model")
    layers: int = Field(6, ge=1, le=1000, description="of the tiny decoder")
    width: int = Field(256, ge=8, le=65536, description="of the tiny decoder, 64 per head")
    init: float = Field(0.02, gt=0, le=1, description="standard deviation of the tiny decoder's first weights")
    image_tokens: int = Field(49, ge=0, le=65536, description="that the connector hands over; 0: all patches")
    stages: tuple[Literal["language", "align", "tune"], ...] = Field(
        ("language", "align"), description="that the base went through, which all arms start from"
    )
    language_epochs: int = Field(4, ge=1, le=10_000, description="over captions of the half of the images set apart")
    align_epochs: int = Field(2, ge=1, le=10_000, description="over the other half")
    align: Literal["connector", "all"] = Field("connector", description="what is trained in alignment")
    beams: int = Field(1, ge=1, le=64, description="1: greedy")
    max_tokens: int = Field(24, ge=1, le=65536, description="most tokens of an answer")
    new_tokens: int = Field(20, ge=1, le=65536, description="tokens that a timed step writes, whatever they are")
    shots: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(
        (), description="of a few-shot task, how many image-caption examples stand before a query: one pass for each"
    )

    @field_validator("shots")
    @classmethod
    def _each_once(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(shots)) < len(shots):
            raise ValueError("a number of examples stands twice")
        return tuple(sorted(shots))

    @model_serializer(mode="wrap")
    def _without_what_is_not_asked(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Envelopes of other tasks are what they were before there were few-shot tasks."""
        return {key: value for key, value in whole(self).items() if key != "shots" or value}


class Protocol(Model):
    """Everything that is held equal between the arms of one experiment."""

    train: Literal["none", "locked", "full"] = "locked"
    epochs: int = Field(12, ge=0, le=100_000)
    batch_size: int = Field(256, ge=2, le=1_000_000)
    eval_batch: int = Field(64, ge=1, description="images per step of the quality pass")
    image_size: int = Field(224, ge=8, le=4096)
    head: Literal["cosine", "sigmoid", "bilinear"] = "cosine"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    dev_checks: int = Field(1, ge=1, description="looks at the dev split per epoch; the best one is kept")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps that the one-cycle schedule rises")
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    seeds: tuple[int, ...] = (0,)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of training; bf16 by autocast")
    engine: Literal["plain", "deepspeed"] = "plain"
    zero_stage: int = Field(0, ge=0, le=3, description="what DeepSpeed's ZeRO shards")
    processes: int = Field(1, ge=1, description="processes that share a training batch")
    device: str = "cpu"
    threads: int = Field(1, ge=1)
    timing_batch: int = Field(16, ge=1, description="images per timed pair")
    timing_pairs: int = Field(30, ge=0, description="timed pairs of baseline and arm")
    data_share: float = Field(1.0, gt=0, le=1, description="share of the training split that is used")
    captioning: Captioning | None = Field(None, description="None: the task writes no text")

    def autocast(self) -> AbstractContextManager[object]:
        """What a training step's forward pass runs in."""
        if self.precision == "fp32":
            return nullcontext()
        import torch

        return torch.autocast(torch.device(self.device).type, torch.bfloat16)


def kind_of_device(device: str) -> str:
    """ "cuda" of "cuda:1"; which of several GPUs it was is told by the device's model."""
    return device.partition(":")[0]


class Envelope(Model):
    """All that must be equal before two results may be ranked together."""

    task: Text
    data: Text
    data_fingerprint: Text
    synthetic: bool = Field(False, description="the images were drawn by a program, as those of the embedded data set")
    images: dict[str, Count]
    captions: dict[str, Count]
    split: Text = "test"
    metrics: tuple[Text, ...]
    recall: Text = Field("ties count against the model", description="how ranks are defined")
    backbone: Text
    weights: Text = Field(
        description="`sha256:` and 16 hex digits of the loaded state dict, `random`, or a pretrained tag"
    )
    transform: Text
    protocol: Protocol
    device_model: Text

    @property
    def digest(self) -> str:
        """Twelve hex digits that name the envelope."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Provenance(Model):
    """What is shown but not hashed, since arms and days may differ in it."""

    command: Text = ""
    effbench: Text = ""
    commit: Text = ""
    versions: dict[str, Text] = {}
    platform: Text = ""
    python: Text = ""
    threading: dict[str, Text] = Field({}, description="environment variables that change how threads share the cores")
    load: Finite | None = Field(None, description="load average per core when the run started")
    machine: dict[str, Text] = Field({}, description="CPU flags, governor, limits, driver, clocks, where readable")
    until: Finite | None = Field(None, description="relative half-width at which timing stopped early")
    budget: Seconds | None = Field(None, description="seconds that timing was allowed")
    resumed: Count = Field(0, description="how often the run was resumed")
    data_origin: Text = ""


class Interval(Model):
    """A figure with its 95 % interval; `low` and `high` are None where there are too few samples."""

    value: Finite
    low: Finite | None = None
    high: Finite | None = None
    n: Count = 0

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, relative to the figure; None where there is none."""
        if self.low is None or self.high is None or not self.value:
            return None
        return (self.high - self.low) / (2 * self.value)


class Speedup(Interval):
    """Median of paired ratios baseline time / arm time."""

    verdict: Literal["FASTER", "SLOWER", "NO DIFFERENCE", "AMBIGUOUS", "TOO FEW SAMPLES"]


class Timing(Model):
    """Timed steps of one arm at one batch size."""

    batch: Annotated[int, Field(ge=1)]
    seconds: Seconds = Field(description="mean of the middle half of the arm's steps")
    low: Seconds | None = Field(None, description="a quarter of the steps took less")
    high: Seconds | None = Field(None, description="a quarter of the steps took more")
    speedup: Speedup | None = Field(None, description="against the baseline; None for the baseline itself")


class Decoding(Model):
    """How an arm writes at one batch size; the tokens are those of the texts, not of a search's beams."""

    batch: Annotated[int, Field(ge=1)] = Field(description="texts that are written together")
    tokens: Annotated[int, Field(ge=1)] = Field(description="that are written of each text")
    prefix: Count | None = Field(None, description="tokens before the text: those of the image, and what is around it")
    first_token: Seconds | None = Field(
        None, description="up to the second token: image tower, connector, prefill, choosing the first one"
    )
    per_token: Seconds | None = Field(None, description="of each further token of all texts; None: there is none")
    first_token_speedup: Speedup | None = None
    per_token_speedup: Speedup | None = None
    cache_bytes: Count | None = Field(None, description="keys and values of all texts when the last token is written")
    first_token_flops: Count | None = Field(None, description="of a text up to its first token, all that is computed")
    prefill_flops: Count | None = Field(None, description="of first_token_flops, the language model's")
    decode_flops: Count | None = Field(None, description="of a text from its second token on, all that is computed")

    @property
    def tokens_per_second(self) -> float | None:
        """Further tokens of all texts together."""
        return self.batch / self.per_token if self.per_token else None


class TimeSplit(Model):
    """Seconds of one phase over all its steps; the parts from image to optimiser add up to compute."""

    total: Seconds
    data_wait: Seconds = Field(0.0, description="waiting for decoded batches; shared by all arms")
    transfer: Seconds = Field(0.0, description="from the host to the device; shared by all arms")
    compute: Seconds = 0.0
    image: Seconds = Field(0.0, description="image tower, without the method's overhead; forward only")
    text: Seconds = Field(0.0, description="text tower, without the method's overhead; forward only")
    overhead: Seconds = Field(0.0, description="the method's own scoring and matching")
    connector: Seconds = Field(0.0, description="from the image tower's tokens to those of the language model")
    prefill: Seconds = Field(0.0, description="language model, a whole sequence at once; forward only")
    decode: Seconds = Field(0.0, description="the second token that is written and all after it, one by one")
    head: Seconds = Field(0.0, description="what is left of compute: projection, similarity, loss")
    backward: Seconds = 0.0
    optimiser: Seconds = 0.0
    settle: Seconds = Field(0.0, description="choices that a method makes by a look at the data; within compute")
    features: Seconds = Field(0.0, description="the frozen tower's feature pass; within compute")
    first_step: Seconds = Field(0.0, description="the first step, warm-up included; within compute")
    steps: Count = 0


class Flops(Model):
    """Floating-point operations per image-caption pair; 1 MAC = 2 FLOPs."""

    dense: Count = Field(description="as dense kernels do them")
    useful: Count | None = Field(None, description="of dense, what masks leave; None in records of schema 1")
    low_bit: Count = Field(0, description="bit operations: MACs x weight bits x activation bits; not within dense")
    low_bit_macs: Count = 0
    overhead: Count = Field(0, description="the method's own scoring and matching; not within dense")
    complete: bool = Field(
        True, description="False: an operation without a formula was seen, the count is a lower bound"
    )
    unknown: tuple[Text, ...] = ()
    analytic: Count | None = Field(None, description="dense by the layers' formulas; None: a layer without a formula")
    once: Count = Field(
        0, description="of a training step: a feature pass per image, which dense and overhead spread over the epochs"
    )

    @property
    def work(self) -> int:
        """Everything that is computed, low-bit products as if they were floating-point: what the FLOPs promise."""
        return self.dense + self.overhead + 2 * self.low_bit_macs


class Memory(Model):
    """Bytes of an arm in a fresh process, median of `runs` processes: by the system, and by the tensors that lived."""

    weights: Count
    load_peak: Count = Field(description="peak growth of the process while the model is built and loaded")
    run_peak: Count = Field(description="peak growth of the process over the whole life of the arm")
    tensor_peak: Count | None = Field(None, description="peak of all live tensors together (CUDA: allocated)")
    activations: Count | None = Field(None, description="tensor_peak's share that is neither of the others")
    gradients: Count | None = Field(None, description="gradients of the parameters; of a training step")
    optimiser: Count | None = Field(None, description="optimiser state; of a training step")
    cache: Count | None = Field(None, description="key-value cache of a decoder")
    reserved: Count | None = Field(None, description="CUDA: peak that torch's allocator took from the device")
    process: Count | None = Field(
        None, description="CUDA: the device's memory that the process holds, as the driver says"
    )
    runs: Count = 1


class Kernels(Model):
    """How an arm really computes: where this differs, a speed-up is kernel effect x method effect."""

    attention: dict[str, Count] = Field({}, description="attention calls of one test step by path, e.g. sdpa:flash")
    precision: dict[str, Count] = Field({}, description="matrix products of one test step by dtype")
    autocast: bool = False
    compiled: bool = False
    channels_last: bool = False
    threads: Count = 0


class Structure(Model):
    """What of the model is there at run time."""

    dtypes: dict[str, Count] = Field({}, description="bytes of weights by dtype")
    quantised_share: Finite = Field(
        0.0, description="share of the weights of linear layers and convolutions, by number"
    )
    trained_layers: tuple[Text, ...] = Field((), description="modules whose own parameters are trained")
    masked_tokens: bool = Field(False, description="fewer tokens are claimed or attended to, but none is removed")


FROZEN_TOWER = "frozen tower"  # of a fingerprint, the output that no training changes


class Fingerprint(Model):
    """What a model computes on a few fixed test images, as few numbers (`effbench.measure.fingerprint`)."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = Field(description="of the outputs' exact bits")
    vectors: dict[str, tuple[Finite, ...]] = Field({}, description="by output, its projections on random directions")
    images: Count = 0


class Energy(Model):
    """Joules of the timed steps."""

    joules_per_step: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: Text = Field(description="what was read, e.g. RAPL package or NVML")


class Calibration(Model):
    """What A/A trials of this machine showed (`effbench calibrate`)."""

    created: datetime
    device_model: Text
    threads: Annotated[int, Field(ge=1)]
    backbone: Text
    batch: Annotated[int, Field(ge=1)]
    pairs: Annotated[int, Field(ge=1)]
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    trials: Annotated[int, Field(ge=1)]
    noise_floor: Finite = Field(description="95th percentile of |speed-up - 1| between identical arms")
    coverage: Finite = Field(description="share of the 95 % intervals that hold 1")
    half_width: Finite = Field(description="median relative half-width of the intervals")
    verdicts: dict[str, Count] = Field(description="trials by verdict")
    slower_by: Finite | None = Field(None, description="share of a step that the slower arm has on top")
    slower_trials: Count = 0
    slower_found: Count = Field(0, description="of them, called SLOWER")
    effbench: Text = ""


class MetricValue(Model):
    """A metric of one arm and its lossy-ness against the baseline of the same seeds."""

    value: Finite = Field(description="mean over the seeds")
    low: Finite | None = None
    high: Finite | None = None
    higher_is_better: bool
    unit: Text = "%"
    chance: Finite | None = None
    ceiling: Finite | None = None
    lossiness: Interval | None = Field(None, description="1 - q/q_baseline as a fraction; None where it is not defined")
    note: Text = Field("", description="why there is no lossy-ness, or what limits its interval")
    by_seed: tuple[Finite, ...] = ()
    margin: Finite | None = Field(None, description="lossy-ness below which two arms count as equal")
    equivalent: bool | None = Field(None, description="both one-sided tests at 5 % put |lossy-ness| below the margin")


def in_interval(figure: Interval | MetricValue | None) -> bool:
    """Whether a figure has an interval and lies in it; files may be edited by hand."""
    return figure is not None and None not in (figure.low, figure.high) and figure.low <= figure.value <= figure.high


class Versus(Model):
    """The primary metric of an arm beside that of a control at the same budget."""

    control: Text = Field(description="random, grid or norm: the same tokens or blocks; resize: the same FLOPs")
    arms: tuple[Text, ...] = Field(description="names of the control's arms; of two, it lies between them")
    share: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="weight of the last of `arms`")
    value: Finite = Field(description="the control's metric")
    advantage: Interval = Field(description="arm - control, in the metric's unit, turned so that positive is better")
    verdict: Literal["BETTER", "WORSE", "NO DIFFERENCE SHOWN"]


class Interaction(Model):
    """A stack against its parts: 1 where they add up as if each stood alone."""

    parts: tuple[Text, ...] = Field(description="names of the arms that hold one method each")
    speedup: Interval = Field(description="speed-up of the stack / product of its parts' speed-ups")
    quality: Interval | None = Field(
        None, description="1 - lossy-ness of the stack / product of its parts'; None where it is not defined"
    )


class PerImage(Model):
    """Of a method whose token counts depend on the image: what single images take, and what padding makes of it."""

    images: Count
    flops: Interval = Field(description="work of one image-caption pair at batch 1: mean, 5 % and 95 % quantile")
    batch: Count
    padded: Count = Field(description="work per pair in a batch of `batch`, padded to its longest")


class Economics(Model):
    """What an arm's own training cost, and what it brought; means over the seeds."""

    share: Annotated[float, Field(gt=0, le=1)] = Field(description="of the baseline's best dev quality, to be reached")
    metric: Text = Field("", description="of dev that target and best_dev are of; empty: the primary metric of test")
    target: Finite | None = Field(
        None, description="the primary metric on dev to be reached; None: the baseline is at chance"
    )
    best_dev: Finite = Field(description="the arm's best value of it")
    seeds: Count
    reached: Count = Field(description="seeds of which some look at dev came to the target")
    seconds_to_target: Seconds | None = Field(
        None, description="choices, feature pass, steps up to the look that came to it; None: not every seed did"
    )
    flops_to_target: Amount | None = Field(None, description="the same without the choices")
    tuning_seconds: Seconds = Field(description="the whole training")
    tuning_flops: Amount | None = None
    saved_per_query: Finite | None = Field(
        None, description="seconds that a timed test step saves per image-caption pair; negative: it costs more"
    )
    break_even: Amount | None = Field(None, description="queries after which they have paid for the whole training")
    note: Text = Field("", description="why there is no target or no break-even")


class Answer(Model):
    """A text that an arm wrote about a test image, and what people wrote."""

    image: Text = Field(description="name of the test image")
    question: Text = Field("", description="empty where nothing is asked")
    text: Text = Field(description="by the weights of the first seed; empty where the arm wrote nothing")
    references: tuple[Text, ...] = Field((), max_length=8, description="one or two of the image's references")


class Arm(Model):
    """One model under test."""

    name: Text
    spec: Text = Field(description="canonical stack of methods; empty for the baseline")
    kind: Literal["baseline", "control", "method"]
    control: Text = Field("", description="noop, identity, random, grid, norm, resize, part; for a control")
    controls_for: tuple[Text, ...] = Field((), description="the arms that it is a control of")
    phase: Literal["test", "train", "both"] = "test"
    source: Text = ""
    trained_by: Text = Field("", description="the arm whose weights it has; empty: its own, or nothing is trained")
    status: Literal["ok", "FAILED", "INVALID"] = "ok"
    error: Text = ""
    train_time: TimeSplit | None = Field(None, description="None: the arm uses the baseline's own weights")
    test_time: TimeSplit | None = None
    train_speedup: Speedup | None = None
    test_speedup: Speedup | None = Field(None, description="compute: method-side batch work and model")
    image_speedup: Speedup | None = Field(None, description="image tower alone")
    text_speedup: Speedup | None = Field(None, description="text tower alone")
    end_to_end_speedup: Speedup | None = Field(None, description="data wait and transfer included")
    method_speedup: Speedup | None = Field(
        None, description="against identity, which has the arm's kernels and none of its methods: their own part"
    )
    ceiling: Finite | None = Field(None, description="Amdahl: speed-up if what the arm changes took no time")
    promised: Finite | None = Field(None, description="speed-up that the FLOPs promise, overhead included")
    realised: Finite | None = Field(None, description="test speed-up / promised")
    step_time: TimeSplit | None = Field(None, description="the middle half of the timed steps, warm-up apart")
    by_batch: tuple[Timing, ...] = Field((), description="timed steps at several batch sizes")
    pays_from: Count | None = Field(None, description="smallest batch from which on the arm is FASTER")
    decoding: tuple[Decoding, ...] = Field((), description="how it writes, by batch size; empty where it does not")
    energy: Energy | None = None
    train_flops: Flops | None = Field(None, description="one training step, per pair")
    test_flops: Flops | None = None
    parameters: Count = 0
    trained_parameters: Count = 0
    weight_bytes: Count = 0
    disk_bytes: Count = Field(0, description="of its saved state dict, as torch.save writes it")
    memory: Memory | None = Field(None, description="of a test step")
    train_memory: Memory | None = Field(None, description="of a training step; None: nothing is trained")
    kernels: Kernels | None = None
    structure: Structure | None = None
    census: dict[str, Count] = Field({}, description="operations of one test step by name, views left out")
    fingerprint: Fingerprint | None = None
    tokens: tuple[Count, ...] = Field((), description="tokens that enter each block's MLP in the image tower, as seen")
    metrics: dict[str, MetricValue] = {}
    versus: tuple[Versus, ...] = Field((), description="against controls at the same budget")
    interaction: Interaction | None = Field(None, description="of a stack whose parts are arms of the same record")
    per_image: PerImage | None = Field(None, description="where token counts depend on the image")
    agreement: dict[str, Interval] = Field(
        {}, description="with the baseline: shares of equal answers, and cosines (..._cosine)"
    )
    answers: tuple[Answer, ...] = Field((), max_length=100, description="a few of the texts that it wrote")
    losses: dict[str, tuple[Finite, ...]] = Field({}, description="mean training loss per epoch, by seed")
    dev: dict[str, tuple[Finite, ...]] = Field({}, description="primary metric at each look at the dev split, by seed")
    economics: Economics | None = Field(None, description="None: the arm trained nothing of its own")
    notes: tuple[Text, ...] = ()
    no_quality: Text = Field("", description="why its quality means nothing and is not shown; empty where it does")


class Record(Model):
    """One task x one backbone x several arms x seeds under one protocol."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    created: datetime
    status: Literal["ok", "INVALID"] = "ok"
    why_invalid: Text = ""
    wall_time: Seconds = 0.0
    peak_memory: Count = Field(0, description="peak resident bytes of the experiment's own process")
    lockstep_overhead: Finite = Field(0.0, description="share of the steps' wall time spent outside data and compute")
    energy: Text = Field("", description="how energy was measured, or why it was not")
    calibration: Calibration | None = Field(None, description="of this machine, where there is one")
    primary_metric: Text
    envelope: Envelope
    provenance: Provenance
    arms: tuple[Arm, ...]
    notes: tuple[Text, ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            KeyError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def control(self, name: str) -> Arm | None:
        """The control of that kind, e.g. "noop"; None where there is none, and the first of several."""
        return next((arm for arm in self.arms if arm.control == name), None)

    def baseline(self) -> Arm:
        """The baseline arm (a record always has one)."""
        return next(arm for arm in self.arms if arm.kind == "baseline")
