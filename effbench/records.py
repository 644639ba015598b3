"""The result schema: what one experiment leaves on disk. Read without torch; files from elsewhere are untrusted.

A record is one directory: `record.json` (this schema) and `samples.parquet` (raw samples: per-step times and
per-item scores). It is written atomically and never changed.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Text = Annotated[str, Field(max_length=4000)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps that the one-cycle schedule rises")
    seeds: tuple[int, ...] = (0,)
    precision: Literal["fp32"] = "fp32"
    device: str = "cpu"
    threads: int = Field(1, ge=1)
    timing_batch: int = Field(16, ge=1, description="images per timed pair")
    timing_pairs: int = Field(30, ge=0, description="timed pairs of baseline and arm")
    data_share: float = Field(1.0, gt=0, le=1, description="share of the training split that is used")


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
    weights: Text = Field(description="sha256 of the weights file, or `random` / a pretrained tag")
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
    resumed: Count = Field(0, description="how often the run was resumed")
    data_origin: Text = ""


class Interval(Model):
    """A figure with its 95 % interval; `low` and `high` are None where there are too few samples."""

    value: Finite
    low: Finite | None = None
    high: Finite | None = None
    n: Count = 0


class Speedup(Interval):
    """Median of paired ratios baseline time / arm time."""

    verdict: Literal["FASTER", "SLOWER", "NO DIFFERENCE", "AMBIGUOUS", "TOO FEW SAMPLES"]


class TimeSplit(Model):
    """Seconds of one phase (training or testing) over all its steps."""

    total: Seconds
    data_wait: Seconds = Field(0.0, description="waiting for decoded batches; shared by all arms")
    compute: Seconds = 0.0
    features: Seconds = Field(0.0, description="the frozen tower's feature pass; within compute")
    first_step: Seconds = Field(0.0, description="the first step, warm-up included; within compute")
    steps: Count = 0


class Flops(Model):
    """Floating-point operations per image-caption pair; 1 MAC = 2 FLOPs."""

    dense: Count
    overhead: Count = Field(0, description="the method's own scoring and matching; not within dense")
    complete: bool = Field(
        True, description="False: an operation without a formula was seen, the count is a lower bound"
    )
    unknown: tuple[Text, ...] = ()


class Memory(Model):
    """Bytes, measured in a fresh process."""

    weights: Count
    load_peak: Count = Field(description="peak resident growth while the model is built and loaded")
    run_peak: Count = Field(description="peak resident growth over the whole life of the arm")


class MetricValue(Model):
    """A metric of one arm and its lossy-ness against the baseline of the same seeds."""

    value: Finite = Field(description="mean over the seeds")
    low: Finite | None = None
    high: Finite | None = None
    higher_is_better: bool
    unit: Text = "%"
    chance: Finite | None = None
    lossiness: Interval | None = Field(None, description="1 - q/q_baseline as a fraction; None where it is not defined")
    note: Text = Field("", description="why there is no lossy-ness, or what limits its interval")
    by_seed: tuple[Finite, ...] = ()


class Arm(Model):
    """One model under test."""

    name: Text
    spec: Text = Field(description="canonical stack of methods; empty for the baseline")
    kind: Literal["baseline", "control", "method"]
    control: Text = Field("", description="noop, identity, random or resize, for a control")
    controls_for: tuple[Text, ...] = Field((), description="the arms that it is a control of")
    phase: Literal["test", "train", "both"] = "test"
    source: Text = ""
    status: Literal["ok", "FAILED", "INVALID"] = "ok"
    error: Text = ""
    train_time: TimeSplit | None = Field(None, description="None: the arm uses the baseline's own weights")
    test_time: TimeSplit | None = None
    train_speedup: Speedup | None = None
    test_speedup: Speedup | None = Field(None, description="end to end: method-side batch work and model")
    image_speedup: Speedup | None = Field(None, description="image tower alone")
    train_flops: Flops | None = Field(None, description="one training step, per pair")
    test_flops: Flops | None = None
    parameters: Count = 0
    trained_parameters: Count = 0
    weight_bytes: Count = 0
    memory: Memory | None = None
    tokens: tuple[Count, ...] = Field((), description="tokens that enter each block's MLP in the image tower, as seen")
    metrics: dict[str, MetricValue] = {}
    losses: dict[str, tuple[Finite, ...]] = Field({}, description="mean training loss per epoch, by seed")
    notes: tuple[Text, ...] = ()


class Record(Model):
    """One task x one backbone x several arms x seeds under one protocol."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    created: datetime
    status: Literal["ok", "INVALID"] = "ok"
    why_invalid: Text = ""
    wall_time: Seconds = 0.0
    peak_memory: Count = Field(0, description="peak resident bytes of the experiment's own process")
    lockstep_overhead: Finite = Field(0.0, description="share of the steps' wall time spent outside data and compute")
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

    def baseline(self) -> Arm:
        """The baseline arm (a record always has one)."""
        return next(arm for arm in self.arms if arm.kind == "baseline")
