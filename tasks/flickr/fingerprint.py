"""A fingerprint of captions, splits and photos that does not read a gigabyte of photos on every run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from effbench.datasets import cache_dir
from effbench.task import Example


def fingerprint(splits: dict[str, list[Example]], progress: Callable[[str, int, int], None]) -> str:
    """sha256 over splits, file names, captions and the photos' contents, as 64 hex digits.

    The hash of a photo is taken from an index in the cache while the file's size and modification time stand.
    """
    contents = _contents([example.image for examples in splits.values() for example in examples], progress)
    digest = hashlib.sha256()
    for split in sorted(splits):
        rows = sorted((example.name, example.captions, contents[example.name]) for example in splits[split])
        digest.update(json.dumps([split, rows]).encode())
    return digest.hexdigest()


def _contents(photos: list[Path], progress: Callable[[str, int, int], None]) -> dict[str, str]:
    """sha256 of each photo by file name; all photos lie in one folder."""
    folder = photos[0].parent.resolve()
    file = cache_dir() / "index" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:20]}.json"
    index = _read(file)
    fresh = {}
    for done, photo in enumerate(photos):
        stat = photo.stat()
        signature = f"{stat.st_size}:{stat.st_mtime_ns}"
        known = index.get(photo.name, [])
        if known[:1] != [signature]:
            progress("hashing photos", done, len(photos))
            known = [signature, hashlib.sha256(photo.read_bytes()).hexdigest()]
        fresh[photo.name] = known
    if fresh != index:
        # without a writable cache the next run hashes again: slower, not wrong
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(fresh))
            part.replace(file)
    return {name: known[1] for name, known in fresh.items()}


def _read(file: Path) -> dict[str, list[str]]:
    """The index, or an empty one where it is missing or damaged."""
    try:
        index = json.loads(file.read_text())
        return {name: [str(signature), str(digest)] for name, (signature, digest) in index.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
