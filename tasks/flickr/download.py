"""Download of the two official archives: resumed after a break, moved into place when whole, unpacked with care."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from effbench.datasets import cannot_write
from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench_tasks.flickr.unpack import unpack

Progress = Callable[[str, int, int], None]

#: a release with unchanged copies of the archives; the address of the University of Illinois is gone
URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
#: archive, the folder that it becomes, the kind of file that is taken from it
ARCHIVES = (
    ("Flickr8k_text.zip", "Flickr8k_text", ".txt"),
    ("Flickr8k_Dataset.zip", "Flicker8k_Dataset", ".jpg"),
)
TRIES = 4
WAIT_S = 2.0
TIMEOUT_S = 30.0
CHUNK = 1 << 18
AGAIN = "run the same command again: it goes on where it stopped"
ELSEWHERE = "name another server with --url or EFFBENCH_FLICKR8K_URL, or copy the data there and use --data PATH"


def download(to: Path, progress: Progress, url: str | None = None) -> Path:
    """Get what is missing of the official copy in the folder `to`.

    The sha256 of each archive is recorded beside that folder on first use and compared ever after.

    Args:
        url: address of the folder that holds the archives; else EFFBENCH_FLICKR8K_URL, else `URL`.

    Returns:
        The folder.

    Raises:
        UsageError: the address is not http or https.
        EffbenchError: network, server or disk failed; what is finished stays.
        InvalidError: an archive is damaged, or differs from the recorded one.
    """
    base = (url or os.environ.get("EFFBENCH_FLICKR8K_URL") or URL).rstrip("/")
    if not base.startswith(("https://", "http://")):
        raise UsageError(f"{base} is not an http or https address", ELSEWHERE)
    try:
        to.mkdir(parents=True, exist_ok=True)
        with FileLock(to / ".download.lock", timeout=0):
            for archive, folder, suffix in ARCHIVES:
                if (to / folder).is_dir():
                    (to / archive).unlink(missing_ok=True)
                    continue
                file = to / archive
                if not file.exists():
                    fetch(f"{base}/{archive}", file, progress)
                digest = _compare(file, to.with_name(f"{to.name}.sha256.json"))
                unpack(file, to / folder, suffix, progress)
                _record(archive, digest, to.with_name(f"{to.name}.sha256.json"))
                file.unlink()
    except Timeout:
        raise EffbenchError(f"another download into {to} is under way", "wait for it to end") from None
    except OSError as error:
        raise cannot_write(to, error) from None
    return to


def fetch(url: str, file: Path, progress: Progress) -> None:
    """Download one file. What has arrived is kept as `FILE.part`, and a later call goes on from there.

    Raises:
        EffbenchError: the server refuses, or the connection broke `TRIES` times in a row without bringing anything.
        OSError: the disk failed.
    """
    part = file.with_name(file.name + ".part")
    tries, furthest = 0, _size(part)
    while True:
        try:
            _transfer(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise EffbenchError(f"{url}: the server answers {error.code} {error.reason}", ELSEWHERE) from None
            reason = f"the server answers {error.code} {error.reason}"
        except _Broken as error:
            reason = str(error)
        except ValueError as error:
            raise UsageError(f"{url}: {error}", ELSEWHERE) from None
        tries = 0 if _size(part) > furthest else tries + 1
        furthest = max(furthest, _size(part))
        if tries >= TRIES:
            hint = f"{AGAIN}; or {ELSEWHERE}" if furthest else ELSEWHERE
            raise EffbenchError(f"{url}: {reason} ({furthest:,} bytes arrived)", hint)
        progress(f"{reason}; trying again", furthest, 0)
        time.sleep(WAIT_S * tries)
    os.replace(part, file)
    _validator_file(part).unlink(missing_ok=True)


class _Broken(Exception):
    """The connection failed or ended early."""


def _transfer(url: str, part: Path, progress: Progress) -> None:
    """One connection: append to `part` what it lacks."""
    have, validator_file = _size(part), _validator_file(part)
    request = urllib.request.Request(url, headers={"User-Agent": "effbench"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        # a file that changed on the server is sent whole instead of being joined to the old part
        if validator_file.exists():
            request.add_header("If-Range", validator_file.read_text())
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            part.unlink()
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_why(error)) from None
    with reply:
        if reply.status != 206:
            have = 0
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise _Broken("the server sent another range than was asked for")
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else 0
        _check_room(part.parent, total - have)
        etag = reply.headers.get("ETag", "")
        validator_file.write_text(etag if etag.startswith('"') else reply.headers.get("Last-Modified", ""))
        if not validator_file.stat().st_size:
            validator_file.unlink()
        with open(part, "ab" if have else "wb") as out:
            while chunk := _receive(reply):
                out.write(chunk)
                have += len(chunk)
                progress(f"downloading {part.stem}", have, max(total, have))
            out.flush()
            os.fsync(out.fileno())
    if have < total:
        raise _Broken(f"the connection ended after {have:,} of {total:,} bytes")


def _receive(reply: http.client.HTTPResponse) -> bytes:
    try:
        return reply.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_why(error)) from None


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return "the server does not answer in time" if isinstance(reason, TimeoutError) else str(reason) or repr(reason)


def _check_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise EffbenchError(
            f"{folder} has {free >> 20:,} MiB free, the download needs {wanted >> 20:,} MiB",
            "make room, or choose another folder with --to",
        )


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _validator_file(part: Path) -> Path:
    """Holds the server's ETag or date of the version that `part` is a piece of."""
    return part.with_name(part.name + ".version")


def _compare(file: Path, record: Path) -> str:
    """The file's sha256, which must be the recorded one where there is one."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    known = _recorded(record).get(file.name, digest)
    if digest != known:
        raise InvalidError(
            f"{file} has sha256 {digest}, but an earlier download had {known} (recorded in {record})",
            f"delete {file} to download it again; if the new one is right, delete its line in the record",
        )
    return digest


def _record(archive: str, digest: str, record: Path) -> None:
    part = record.with_suffix(".part")
    part.write_text(json.dumps(_recorded(record) | {archive: digest}, indent=1) + "\n")
    part.replace(record)


def _recorded(record: Path) -> dict[str, str]:
    if not record.exists():
        return {}
    try:
        return {str(name): str(digest) for name, digest in json.loads(record.read_text()).items()}
    except (ValueError, AttributeError):
        raise InvalidError(f"{record} is not a record of checksums", "delete it") from None
