"""Unpack an archive from the internet: plain file names only, within bounds, all of it or nothing."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from effbench.errors import InvalidError

MAX_FILES = 50_000
MAX_BYTES = 8 << 30


def unpack(archive: Path, folder: Path, suffix: str, progress: Callable[[str, int, int], None]) -> None:
    """Write the archive's files that end in `suffix`, without their folders, into a new `folder`.

    Raises:
        InvalidError: it is no zip file (it is then deleted, so that the next download is a new one), is damaged,
            holds names that lead out of the folder, or is larger than any copy of the data set.
        OSError: the disk failed; nothing is left of `folder`.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with zipfile.ZipFile(archive) as source:
            members = _members(source, archive, suffix)
            for done, (name, member) in enumerate(members.items()):
                progress(f"unpacking {archive.name}", done, len(members))
                with source.open(member) as data, open(part / name, "xb") as out:
                    shutil.copyfileobj(data, out)
        os.replace(part, folder)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, ValueError) as error:
        archive.unlink()
        raise InvalidError(
            f"{archive.name} is damaged and was deleted: {error}", "run the same command again, or name another --url"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _members(source: zipfile.ZipFile, archive: Path, suffix: str) -> dict[str, zipfile.ZipInfo]:
    """The wanted members by plain file name."""
    members: dict[str, zipfile.ZipInfo] = {}
    for member in source.infolist():
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or set(member.filename) & set("\\:"):
            raise _refused(archive, f"it holds {member.filename[:80]!r}, which leads out of its folder")
        if path.suffix != suffix or member.is_dir() or path.parts[0] == "__MACOSX" or path.name.startswith("."):
            continue
        if path.name in members:
            raise _refused(archive, f"it holds {path.name[:80]!r} twice")
        members[path.name] = member
    if not members:
        raise _refused(archive, f"it holds no {suffix} files")
    if len(members) > MAX_FILES or sum(member.file_size for member in members.values()) > MAX_BYTES:
        raise _refused(archive, "it is larger than any copy of flickr8k")
    return members


def _refused(archive: Path, reason: str) -> InvalidError:
    return InvalidError(f"{archive} was not unpacked: {reason}", "delete it and name another server with --url")
