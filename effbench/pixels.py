"""Images decoded once into a memory-mapped file of uint8 pixels.

File: the pixels of train, dev, test one after the other, each image (3, size, size); then a JSON trailer with a
checksum for each block of images and how many were upsampled; then the trailer's length (8 bytes, little-endian) and
`MAGIC`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effbench.datasets import Progress, cache_dir, cannot_write, silent
from effbench.errors import InvalidError
from effbench.task import Data, Example

if TYPE_CHECKING:
    from PIL import Image

#: shorter side to `size` (PIL bicubic, antialiased), centre crop, RGB; an image that has the size is not resampled
RULE = "shorter-side-bicubic-centre-crop-1"
MAGIC = b"effbpix1"
MAX_SOURCE_PIXELS = 80_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def pixels(data: Data, size: int, progress: Progress = silent) -> dict[str, np.ndarray]:
    """The images of each split as a read-only memory map (images, 3, size, size), uint8, RGB.

    They are decoded on first use and kept under `cache_dir()`; a damaged file is rebuilt, with a note in `data.notes`,
    which also says how many images were smaller and had to be upsampled.

    Raises:
        InvalidError: an image cannot be decoded; the message names it.
        EffbenchError: the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    file = cache_dir() / "pixels" / f"{size}px-{_key(data, size)}.u8"
    lock = FileLock(file.with_suffix(".lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("waiting for another run that decodes these images", 0, 0)
            lock.acquire()
    except OSError as error:
        raise cannot_write(file, error) from None
    try:
        damage = _damage(file, data, size)
        if damage:
            if file.exists():
                data.notes.append(f"the pixel cache was rebuilt: {damage}")
            _build(file, data, size, progress)
    finally:
        lock.release()
    if smaller := _trailer(file).get("upsampled", 0):
        data.notes.append(
            f"{smaller:,} of {sum(data.sizes().values()):,} images have fewer than {size} px along their shorter side "
            "and are upsampled: they show no more than they would at that side"
        )
    return _open(file, data, size)


def open_image(example: Example) -> Image.Image:
    """The decoded image, mode RGB.

    Raises:
        InvalidError: it cannot be decoded, or has more than 80 million pixels.
    """
    from PIL import Image

    try:
        if not isinstance(example.image, Path):
            return example.image().convert("RGB")
        with Image.open(example.image, formats=FORMATS) as image:
            if image.width * image.height > MAX_SOURCE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            return image.convert("RGB")
    except Exception as error:  # image libraries and drawing functions raise anything on bad input
        name = example.image if isinstance(example.image, Path) else example.name
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, OSError | ValueError) else str(error)
        raise InvalidError(f"image {name} cannot be decoded: {reason}") from None


def crop(image: Image.Image, size: int) -> np.ndarray:
    """An image by `RULE` as (3, size, size), uint8. Placed as torchvision's Resize and CenterCrop place it."""
    from PIL import Image

    width, height = image.size
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    if short == size:
        image = image.crop((left, top, left + size, top + size))
    else:
        # only the crop is computed: the resized image of a very long strip would not fit in memory
        x, y = width / wide, height / high
        box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _block(size: int) -> int:
    """Images that are decoded, written and checked together: some 16 MiB."""
    return max(1, min(128, 2**24 // (3 * size * size)))


def _key(data: Data, size: int) -> str:
    names = [[split, [example.name for example in examples]] for split, examples in data.splits.items()]
    text = json.dumps([data.fingerprint, names, size, RULE])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _build(file: Path, data: Data, size: int, progress: Progress) -> None:
    """Decode all images into a temporary file and move it into place.

    It is written with write(), since a disk that fills up kills a process that writes through a memory map.
    """
    examples = [example for split in data.splits.values() for example in split]
    part = file.with_suffix(".part")
    checksums, count, smaller = [], _block(size), 0

    def decoded(example: Example) -> tuple[np.ndarray, bool]:
        image = open_image(example)
        return crop(image, size), min(image.size) < size

    try:
        with open(part, "wb") as out, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(examples), count):
                progress(f"decoding images to {size} px", start, len(examples))
                images, small = zip(*pool.map(decoded, examples[start : start + count]), strict=True)
                block, smaller = np.stack(images), smaller + sum(small)
                out.write(block.data)
                checksums.append(zlib.crc32(block.data))
            trailer = json.dumps({"crc32": checksums, "upsampled": smaller}).encode()
            out.write(trailer + len(trailer).to_bytes(8, "little") + MAGIC)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
        progress(f"decoding images to {size} px", len(examples), len(examples))
    except InvalidError as error:
        error.hint = f"`effbench data check {data.name} --data {data.origin}` lists all damaged images"
        raise
    except OSError as error:
        raise cannot_write(part, error) from None
    finally:
        part.unlink(missing_ok=True)


def _damage(file: Path, data: Data, size: int) -> str:
    """Why the file cannot be used, or an empty string. It is read, not mapped: a bad disk then raises an error."""
    images = sum(data.sizes().values())
    try:
        with open(file, "rb") as stream:
            stream.seek(-min(16, os.fstat(stream.fileno()).st_size), os.SEEK_END)
            tail = stream.read()
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != MAGIC or file.stat().st_size != images * 3 * size * size + length + 16:
                return "it was truncated"
        checksums = _trailer(file)["crc32"]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            seen = pool.map(lambda block: _crc32(file, block, images, size), range(-(-images // _block(size))))
            return "" if list(seen) == checksums else "its checksum was wrong"
    except FileNotFoundError:
        return "there was none"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it could not be read ({error})"


def _trailer(file: Path) -> dict:
    """What the end of an undamaged file says."""
    with open(file, "rb") as stream:
        stream.seek(-16, os.SEEK_END)
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(-16 - length, os.SEEK_END)
        return json.loads(stream.read(length))


def _crc32(file: Path, block: int, images: int, size: int) -> int:
    """Checksum of a block of images as it is on disk."""
    first, image = block * _block(size), 3 * size * size
    with open(file, "rb") as stream:
        stream.seek(first * image)
        return zlib.crc32(stream.read(min(_block(size), images - first) * image))


def _open(file: Path, data: Data, size: int) -> dict[str, np.ndarray]:
    maps, offset = {}, 0
    for split, images in data.sizes().items():
        shape = (images, 3, size, size)
        maps[split] = np.memmap(file, np.uint8, "r", offset, shape) if images else np.empty(shape, np.uint8)
        offset += images * 3 * size * size
    return maps
