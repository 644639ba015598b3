"""The file of a sweep: what it may say, and what is wrong with one that cannot be read. Imports no torch.

    tasks: [flickr8k]                          # or {name: flickr8k, data: PATH}
    backbones:
      - timm:deit_tiny_patch16_224             # or {name, weights, pretrained, methods, options}
    methods:
      - token_merge: {r: [8, 13, 16]}          # lists are products; several names in one entry are a stack
      - token_prune:keep=0.5,at=3/6/9          # or a spec as on the command line
    seeds: 1
    controls: [random, resize]
    arms_per_run: 12                           # else all methods share one experiment, and its baseline
    options: {train: locked, timing_pairs: 20} # options of `effbench run`; captioning: {layers: 8} of a decoder

A backbone's own `methods` stand in place of the sweep's; its `options` are added to the sweep's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from effbench.arms import CONTROLS
from effbench.errors import UsageError
from effbench.quantities import duration, share
from effbench.registry import backbones, did_you_mean, tasks
from effbench.spec import write


def specs(entry: Any) -> list[str]:
    """The stacks that one entry of `methods` stands for: a spec, or {NAME: {parameter: value or list of values}}.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(entry, str):
        return [entry]
    if not isinstance(entry, dict) or not entry:
        raise ValueError("a method is a spec, NAME:param=value, or a mapping, NAME: {param: value}")
    return ["+".join(stack) for stack in product(*(list(_variants(*each)) for each in entry.items()))]


def _variants(name: Any, parameters: Any) -> Iterator[str]:
    if not isinstance(parameters, dict | None):
        raise ValueError(f"the parameters of {name} are a mapping, {name}: {{param: value}}")
    lists = {key: value if isinstance(value, list) else [value] for key, value in (parameters or {}).items()}
    for key, values in lists.items():
        if not values or any(isinstance(value, list | dict) or set(write(value)) & set(",+") for value in values):
            raise ValueError(f"{name}.{key} is a number, a word or a list of them; one tuple is written 3/6/9")
    for chosen in product(*lists.values()):
        text = ",".join(f"{key}={write(value)}" for key, value in zip(lists, chosen, strict=True))
        yield f"{name}:{text}" if text else str(name)


def _named(entry: Any) -> Any:
    return {"name": entry} if isinstance(entry, str) else entry


def _quantity(parse: Callable[[Any], float]) -> BeforeValidator:
    def read(text: Any) -> float:
        try:
            return parse(text)
        except UsageError as error:
            raise ValueError(f"{error}; {error.hint}") from None

    return BeforeValidator(read)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Options(_Strict):
    """Options of `effbench run`; one that is not set is left to it."""

    train: Literal["none", "locked", "full"] = None
    epochs: int = Field(None, ge=0)
    batch_size: int = Field(None, ge=2)
    image_size: int = Field(None, ge=8)
    head: Literal["cosine", "sigmoid", "bilinear"] = None
    lr: float = Field(None, gt=0)
    weight_decay: float = Field(None, ge=0)
    data_share: float = Field(None, gt=0, le=1)
    dev_checks: int = Field(None, ge=1)
    precision: Literal["fp32", "bf16"] = None
    captioning: dict[str, Any] = Field(None, description="fields of `effbench.records.Captioning`")
    threads: int = Field(None, ge=1)
    timing_batch: int = Field(None, ge=1)
    timing_pairs: int = Field(None, ge=0)
    until: Annotated[float, _quantity(share)] = None
    budget: Annotated[float, _quantity(duration)] = None
    batch_sweep: str = None
    memory_runs: int = Field(None, ge=0)
    device: str = None
    engine: Literal["plain", "deepspeed"] = None
    zero_stage: int = Field(None, ge=0, le=3)
    checkpoint_every: float = Field(None, ge=0)


Methods = list[Annotated[list[str], BeforeValidator(specs)]]


class TaskEntry(_Strict):
    name: str
    data: str | None = None


class BackboneEntry(_Strict):
    name: str
    weights: str | None = None
    pretrained: str | None = None
    methods: Methods = Field([], description="in place of the sweep's")
    options: Options = Field(Options(), description="beside the sweep's")


class Sweep(_Strict):
    tasks: list[Annotated[TaskEntry, BeforeValidator(_named)]] = Field(min_length=1)
    backbones: list[Annotated[BackboneEntry, BeforeValidator(_named)]] = Field(min_length=1)
    methods: Methods = Field(min_length=1)
    seeds: int = Field(1, ge=1)
    controls: Annotated[list[Literal[CONTROLS]] | None, BeforeValidator(lambda x: [] if x == "none" else x)] = None
    arms_per_run: int | None = Field(None, ge=1)
    options: Options = Options()


class _UniqueKeys(yaml.SafeLoader):
    """YAML as safe_load reads it, but a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: Path) -> Sweep:
    """The sweep of a file.

    Raises:
        UsageError: it is missing, no YAML, or not a sweep; names the file, the key and what is valid.
    """
    help = "effbench sweep --help"
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", "name a YAML file, e.g. sweeps/tokens.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{path}{where} cannot be read as YAML: {problem}", help) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no sweep, which is a mapping of {', '.join(Sweep.model_fields)}", help)
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise UsageError(*_explained(path, error)) from None
    for entries, key, registry in ((sweep.tasks, "tasks", tasks), (sweep.backbones, "backbones", backbones)):
        for i, entry in enumerate(entries):
            if entry in entries[:i]:
                raise UsageError(f"{path}: {key}[{i}]: {entry.name} stands twice", "name it once")
            family = entry.name.partition(":")[0]
            if family not in (known := registry.names()) and entry.name != "auto":
                kind = "task" if registry is tasks else "family of backbones"
                raise UsageError(
                    f"{path}: {key}[{i}]: unknown {kind} {family!r}{did_you_mean(family, known)}",
                    f"there are: {', '.join(known)}",
                )
    return sweep


SAID = {
    "too_short": "at least one is needed",
    "list_type": "a list is needed, e.g. [a, b]",
    "model_type": "a mapping is needed, or a name where there is one",
    "missing": "this key is needed",
}


def _explained(path: Path, error: ValidationError) -> tuple[str, str]:
    """Message and hint for the first thing that is wrong with a file."""
    # a misspelt key is also a missing one: the former says what to do
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "extra_forbidden":
        within = next((part for part in reversed(first["loc"][:-1]) if isinstance(part, str)), "")
        model = dict(tasks=TaskEntry, backbones=BackboneEntry, options=Options).get(within, Sweep)
        known = list(model.model_fields)
        return f"{path}: {where}: unknown key{did_you_mean(str(first['loc'][-1]), known)}", f"keys: {', '.join(known)}"
    message = SAID.get(first["type"], first["msg"].removeprefix("Value error, "))
    given = "" if first["type"] == "missing" else f" {first['input']!r}"[:80]
    return f"{path}: {where}{given}: {message[0].lower()}{message[1:]}", "effbench sweep --help"
