"""Image-text alignment on Flickr8k: 8,091 photos, five captions each, official splits of 6000/1000/1000."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from effbench.alignment import Alignment
from effbench.datasets import cache_dir
from effbench.errors import DataNotFound, InvalidError
from effbench.task import SPLITS, Data, DataRequest, Example
from effbench_tasks.flickr import layouts
from effbench_tasks.flickr.fingerprint import fingerprint

GET = "`effbench data get flickr8k` downloads it; or name a copy with --data PATH or EFFBENCH_DATA=FOLDER"


class Flickr8k(Alignment):
    """Photos of people and animals with five captions each (Hodosh, Young and Hockenmaier 2013)."""

    stand_in = "scenes"

    #: images by split in a complete copy
    expected: ClassVar[dict[str, int]] = {"train": 6000, "dev": 1000, "test": 1000}

    def load(self, request: DataRequest) -> Data:
        """Find a copy in the official, the Kaggle or Karpathy's layout, and read captions and splits.

        Raises:
            DataNotFound: there is no copy; the message lists the places looked at and why each is none.
            InvalidError: the copy is damaged.
        """
        looked = []
        for place in _places(request.path):
            try:
                found = layouts.find(place)
                if not isinstance(found, str):
                    return _read(place, layouts.read(*found), request.progress)
            except OSError as error:
                raise InvalidError(f"{error.filename or place} cannot be read: {error.strerror}", GET) from None
            looked.append(f"{place} ({found})")
        raise DataNotFound(f"flickr8k was not found; looked at {', '.join(looked)}", GET)

    @classmethod
    def download(
        cls,
        to: Path | None = None,
        progress: Callable[[str, int, int], None] = lambda description, done, total: None,
        url: str | None = None,
    ) -> Path:
        """Download the official copy into the folder `to`, by default into the user's cache, and return that folder.

        Args:
            url: address of the folder that holds the two archives; by default EFFBENCH_FLICKR8K_URL, else the
                release that `effbench_tasks.flickr.download` names.

        Raises:
            EffbenchError: network, server or disk failed; what is finished stays, and the same call resumes.
            InvalidError: an archive is damaged or is not the one that was downloaded before.
        """
        from effbench_tasks.flickr.download import download

        return download(to or _cached(), progress, url)


def _cached() -> Path:
    return cache_dir() / "data" / "flickr8k"


def _places(path: Path | None) -> list[Path]:
    """Folders that may be a copy, the likeliest first. A path that the user named is the only one."""
    named = path or os.environ.get("EFFBENCH_DATA")
    folders = []
    if named:
        folder = Path(named).expanduser()
        folders = [folder / "flickr8k"] if (folder / "flickr8k").is_dir() else [folder]
    return folders if path else [*folders, _cached()]


def _read(place: Path, listing: layouts.Listing, progress: Callable[[str, int, int], None]) -> Data:
    files = set(os.listdir(listing.images))
    used = dict.fromkeys(name for names in listing.splits.values() for name in names)
    for lack, names in [
        ("file in " + str(listing.images), [name for name in used if name not in files]),
        ("captions", [name for name in used if not listing.captions.get(name)]),
    ]:
        if names:
            raise InvalidError(f"{len(names)} photos of the splits have no {lack}: {_few(names)}", GET)
    if empty := [split for split, names in listing.splits.items() if not names]:
        raise InvalidError(f"{place}: no photos in {', '.join(empty)}", GET)

    notes = list(listing.notes)
    if orphans := [name for name in listing.captions if name not in files]:
        count = sum(len(listing.captions[name]) for name in orphans)
        notes.append(f"{count} captions of {len(orphans)} photos without a file were dropped: {_few(orphans)}")
    if unused := [name for name in listing.captions if name in files and name not in used]:
        notes.append(f"{len(unused)} photos are in no split and are not used")
    # in one order, whatever the layout: the same content is the same data set
    splits = {
        split: [Example(listing.images / name, tuple(listing.captions[name]), name) for name in sorted(names)]
        for split, names in ((split, listing.splits[split]) for split in SPLITS)
    }
    return Data("flickr8k", splits, fingerprint(splits, progress), origin=str(place), notes=notes)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
