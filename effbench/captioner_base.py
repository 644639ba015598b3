"""The weights that all arms of a captioning experiment start from: made once, stage by stage, and kept by content.

(a) language: the decoder alone learns from text; (b) align: the connector learns to hand images over, the decoder
frozen unless the protocol says otherwise; (c) tune: connector and decoder learn to caption (LLaVA, arXiv 2304.08485).
Stage (c) is the arms' own training, part of the base only where nothing is trained. The image tower is frozen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from effbench import randomness
from effbench.datasets import cache_dir, cannot_write
from effbench.engine import optimiser
from effbench.training import order, schedule

if TYPE_CHECKING:
    from effbench.captioning import Captioning, Prepared
    from effbench.models.backbones import Backbone
    from effbench.models.captioner import Captioner
    from effbench.records import Protocol

VERSION = 3  # of the making; a base of another version is made anew
TEXTS = 256  # of a batch of text alone
SEED = 0  # one base for all seeds
TRAINING = ("batch_size", "lr", "weight_decay")


def stages(protocol: Protocol) -> tuple[str, ...]:
    """The stages of a base, in order."""
    asked = protocol.captioning.stages
    tuned = protocol.train == "none" or protocol.epochs == 0
    return tuple(name for name in ("language", "align", "tune") if name in asked or (name == "tune" and tuned))


def make(
    task: Captioning,
    prepared: Prepared,
    backbone: Backbone,
    protocol: Protocol,
    live: Any,
    wanted: tuple[str, ...] | None = None,
) -> Path | None:
    """The file of the base; what of it is not there yet is made. None where it has no stage.

    Args:
        wanted: its stages; None for all that the protocol asks for.

    Raises:
        EffbenchError: the cache cannot be written.
    """
    wanted = stages(protocol) if wanted is None else wanted
    files = [_file(task, prepared, backbone, protocol, wanted[: n + 1]) for n in range(len(wanted))]
    if not files or files[-1].is_file():
        return files[-1] if files else None
    try:
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        with FileLock(files[-1].with_suffix(".lock")):
            there = max((n + 1 for n, file in enumerate(files) if file.is_file()), default=0)
            randomness.seed_all(SEED)
            model = task.build(task.recipe(prepared), backbone, protocol).to(protocol.device)
            if there:
                load(model, files[there - 1])
            for stage, file in list(zip(wanted, files, strict=True))[there:]:
                _STAGES[stage](model, task, prepared, _how(task, protocol, stage), live)
                save(model, file)
    except OSError as error:
        raise cannot_write(files[-1], error) from None
    return files[-1]


def _how(task: Captioning, protocol: Protocol, stage: str) -> Protocol:
    """How a stage trains: as the task recommends, whatever the arms' own training is; tuning as the arms do."""
    if stage == "tune":
        return protocol
    return protocol.model_copy(update={key: task.recommended[key] for key in TRAINING})


def missing(task: Captioning, prepared: Prepared, backbone: Backbone, protocol: Protocol) -> tuple[str, ...]:
    """The stages of a base that `make` would have to run, in order; it runs none."""
    wanted = stages(protocol)
    there = [_file(task, prepared, backbone, protocol, wanted[: n + 1]).is_file() for n in range(len(wanted))]
    return wanted[max((n + 1 for n, found in enumerate(there) if found), default=0) :]


def save(model: Captioner, file: Path) -> None:
    """Write what the stages train: connector and language model."""
    from safetensors.torch import save_file

    part = file.with_suffix(".part")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("image_encoder.")}
    once = {v.data_ptr(): k for k, v in reversed(state.items())}  # a head may be the embedding of words
    save_file({k: state[k].contiguous() for k in once.values()}, part)
    part.replace(file)


def load(model: Captioner, file: Path) -> None:
    """Put the weights of a base into a fresh captioner."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(file), strict=False)


def _file(task: Captioning, prepared: Prepared, backbone: Backbone, protocol: Protocol, done: tuple[str, ...]) -> Path:
    """Where a base lies; its name is a digest of all that it depends on."""
    options = protocol.captioning
    facts: dict[str, Any] = dict(version=VERSION, task=task.learns or type(task).__name__, stages=done)
    facts |= dict(
        decoder=options.decoder,
        layers=options.layers,
        width=options.width,
        init=options.init,
        words=len(prepared.words),
    )
    facts |= dict(decoder_weights=prepared.decoder) if prepared.decoder else {}
    facts |= dict(tower=str(backbone), weights=backbone.weights_id, size=protocol.image_size)
    facts |= dict(precision=protocol.precision, language_epochs=options.language_epochs)
    if "align" in done or "tune" in done:
        facts |= dict(image_tokens=options.image_tokens, align=options.align, align_epochs=options.align_epochs)
    facts |= {key: task.recommended[key] for key in TRAINING}
    if "tune" in done:
        facts["tuning"] = [getattr(protocol, key) for key in ("epochs", "data_share", *TRAINING)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in ("language", "tuning"):
        if name in prepared.texts:
            digest.update(prepared.texts[name].ids.tobytes())
    digest.update(prepared.fingerprint.encode())
    return cache_dir() / "bases" / f"{'-'.join(done)}-{digest.hexdigest()[:20]}.safetensors"


def _language(model: Captioner, task: Captioning, prepared: Prepared, protocol: Protocol, live: Any) -> None:
    """The decoder learns to go on with text."""
    from effbench.captioning import text_batch

    texts = prepared.texts["language"]

    def loss(rows: np.ndarray, _: np.random.Generator) -> Tensor:
        batch = _on(text_batch(texts, rows), protocol)
        return model.loss(model.starts(len(rows)), batch["tokens"], batch["target"])

    model.requires_grad_(False).language.requires_grad_(True)
    epochs = protocol.captioning.language_epochs
    texts_a_step = min(TEXTS, len(texts.lengths))
    _fit("the base learns language", model, loss, texts.lengths, texts_a_step, epochs, protocol, live)


def _align(model: Captioner, task: Captioning, prepared: Prepared, protocol: Protocol, live: Any) -> None:
    """The connector learns to hand images over."""
    model.requires_grad_(False).connector.requires_grad_(True)
    if protocol.captioning.align == "all":
        model.language.requires_grad_(True)
    _on_images(
        "the base aligns images", model, task, prepared, protocol, protocol.captioning.align_epochs, "tuning", live
    )


def _tune(model: Captioner, task: Captioning, prepared: Prepared, protocol: Protocol, live: Any) -> None:
    """Connector and decoder learn to write about images."""
    model.requires_grad_(True).image_encoder.requires_grad_(False)
    _on_images("the base is tuned", model, task, prepared, protocol, protocol.epochs, "train", live)


_STAGES: dict[str, Callable[..., None]] = dict(language=_language, align=_align, tune=_tune)


def _on_images(
    name: str,
    model: Captioner,
    task: Captioning,
    prepared: Prepared,
    protocol: Protocol,
    epochs: int,
    split: str,
    live: Any,
) -> None:
    """Train on the images of a split, the frozen tower's tokens computed once."""
    images = len(prepared.rows[split])
    model.eval()
    features = []
    live.stage(f"{name}: tokens of the frozen tower", images, "images")
    with torch.no_grad(), protocol.autocast():
        for start in range(0, images, protocol.eval_batch):
            rows = np.arange(start, min(start + protocol.eval_batch, images))
            batch = _on(task.batch(prepared, split, rows, np.random.default_rng(0)), protocol)
            features.append(task.frozen_features(model, batch["image"]).cpu())
            live.advance(rows[-1] + 1)
    held = torch.cat(features)

    def loss(rows: np.ndarray, rng: np.random.Generator) -> Tensor:
        batch = task.batch(prepared, split, rows, rng, pixels=False) | dict(features=held[torch.from_numpy(rows)])
        return task.loss(model, _on(batch, protocol))

    _fit(name, model, loss, np.ones(images, int), min(protocol.batch_size, images), epochs, protocol, live)


def _fit(
    name: str,
    model: Captioner,
    loss: Callable[[np.ndarray, np.random.Generator], Tensor],
    lengths: np.ndarray,
    size: int,
    epochs: int,
    protocol: Protocol,
    live: Any,
) -> None:
    """AdamW with a one-cycle schedule on what requires gradients; `lengths` are those of the items, (items,)."""
    items = len(lengths)
    total = epochs * (items // size)
    updates = optimiser(model, protocol)
    live.stage(f"{name}, epochs x steps = {epochs} x {items // size}", total)
    model.train().image_encoder.eval()
    for index, (epoch, place, rows) in enumerate(_batches(lengths, size, epochs)):
        for group in updates.param_groups:
            group["lr"] = protocol.lr * schedule(index / total, protocol.warmup)
        with protocol.autocast():
            value = loss(rows, np.random.default_rng([SEED, epoch, place]))
        updates.zero_grad(set_to_none=True)
        value.backward()
        updates.step()
        live.advance(index + 1, {"base": {"loss": value.item()}})


def _batches(lengths: np.ndarray, size: int, epochs: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Epoch, place in it, and the items of each batch, which are of like length: padding costs as much as words."""
    steps = len(lengths) // size
    for epoch in range(epochs):
        rows = order(SEED, epoch, len(lengths))[: steps * size]
        rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(steps, size)
        for place, step in enumerate(order(SEED, epoch, steps)):
            yield epoch, place, rows[step]


def _on(batch: dict[str, Tensor], protocol: Protocol) -> dict[str, Tensor]:
    return {key: value.to(protocol.device) for key, value in batch.items()}
