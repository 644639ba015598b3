"""The download of Flickr8k from a server on loopback: whole, broken, resumed, refused, hostile."""

import io
import json
import os
import resource
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from effbench.errors import EffbenchError, InvalidError, UsageError
from effbench.task import Data, DataRequest
from effbench_tasks.flickr import download as downloading
from effbench_tasks.flickr8k import Flickr8k

SPLITS = {"train": [f"{i}.jpg" for i in range(12)], "dev": ["12.jpg", "13.jpg"], "test": ["14.jpg"]}


def load(path: Path | None = None) -> Data:
    data = Flickr8k().load(DataRequest(path))
    assert data.sizes() == {"train": 12, "dev": 2, "test": 1}
    return data


class Server(ThreadingHTTPServer):
    """Archives on loopback with Range support; `cuts` breaks the next connections after so many bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[-1]
        asked = self.headers.get("Range")
        server.asked.append((name, asked))
        if name not in server.files:
            return self.send_error(404)
        body = server.files[name]
        etag = f'"{hash(body)}"'
        start = 0
        if asked and server.ranges and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][: server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *args):
        pass


def archive(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return file.getvalue()


def photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EFFBENCH_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloading, "WAIT_S", 0)
    monkeypatch.setattr(downloading, "CHUNK", 256)
    names = [name for split in SPLITS.values() for name in split]
    text = {f"Flickr_8k.{split}Images.txt": "\n".join(images).encode() for split, images in SPLITS.items()}
    text["Flickr8k.token.txt"] = "".join(f"{name}#{i}\tA dog .\n" for name in names for i in range(5)).encode()
    junk = {"__MACOSX/Flicker8k_Dataset/._0.jpg": b"junk", "Flicker8k_Dataset/": b""}
    server = Server()
    server.files["Flickr8k_text.zip"] = archive(text)
    server.files["Flickr8k_Dataset.zip"] = archive(junk | {f"Flicker8k_Dataset/{name}": photo() for name in names})
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_found_by_load(server, tmp_path):
    seen = []
    folder = Flickr8k.download(url=server.url + "/", progress=lambda *state: seen.append(state))
    data = load()
    assert data.origin == str(folder) and data.splits["test"][0].image.read_bytes() == photo()
    assert sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) == [
        "Flicker8k_Dataset",
        "Flickr8k_text",
    ]
    size = len(server.files["Flickr8k_Dataset.zip"])
    assert ("downloading Flickr8k_Dataset.zip", size, size) in seen
    asked = len(server.asked)
    Flickr8k.download(url=server.url)
    assert len(server.asked) == asked


def test_broken_transfers_resume(server):
    server.cuts = [300, 500, 700]
    Flickr8k.download(url=server.url)
    assert [wanted for name, wanted in server.asked if name == "Flickr8k_text.zip"] == [
        None,
        "bytes=300-",
        "bytes=800-",
        "bytes=1500-",
    ]
    load()


def test_next_call_resumes_where_the_last_gave_up(server, tmp_path):
    server.cuts = [300] + [0] * downloading.TRIES
    with pytest.raises(EffbenchError, match=r"300 of .* \(300 bytes arrived\)") as caught:
        Flickr8k.download(tmp_path / "to", url=server.url)
    assert "run the same command again" in caught.value.hint
    Flickr8k.download(tmp_path / "to", url=server.url)
    assert server.asked[downloading.TRIES + 1] == ("Flickr8k_text.zip", "bytes=300-")
    load(tmp_path / "to")


@pytest.mark.parametrize("why", ["changed", "no ranges", "stale"])
def test_part_that_cannot_be_resumed_is_fetched_again(server, tmp_path, why):
    server.cuts = [300] + [0] * downloading.TRIES
    with pytest.raises(EffbenchError):
        Flickr8k.download(tmp_path / "to", url=server.url)
    if why == "changed":
        server.files["Flickr8k_text.zip"] += b"\0" * 10
    elif why == "no ranges":
        server.ranges = False
    else:
        with open(tmp_path / "to" / "Flickr8k_text.zip.part", "ab") as part:
            part.write(b"x" * 100_000)
    Flickr8k.download(tmp_path / "to", url=server.url)
    load(tmp_path / "to")


def test_server_that_refuses(server, tmp_path):
    del server.files["Flickr8k_Dataset.zip"]
    with pytest.raises(EffbenchError, match="404") as caught:
        Flickr8k.download(tmp_path / "to", url=server.url)
    assert "--url" in caught.value.hint
    assert (tmp_path / "to" / "Flickr8k_text").is_dir()
    with pytest.raises(UsageError, match="ftp"):
        Flickr8k.download(tmp_path / "to", url="ftp://127.0.0.1")


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "WAIT_S", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("EFFBENCH_FLICKR8K_URL", "http://127.0.0.1:9")
    with pytest.raises(EffbenchError, match="refused"):
        Flickr8k.download(tmp_path / "to")


def test_full_disk_keeps_what_arrived(server, tmp_path, monkeypatch):
    # the limit on file size makes write() fail as a full disk does
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with pytest.raises(EffbenchError, match="cannot write"):
            Flickr8k.download(tmp_path / "to", url=server.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    Flickr8k.download(tmp_path / "to", url=server.url)
    assert server.asked[1] == ("Flickr8k_text.zip", "bytes=400-")
    load(tmp_path / "to")


def test_too_little_room_is_seen_before_the_download(server, tmp_path, monkeypatch):
    usage = downloading.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with pytest.raises(EffbenchError, match="MiB free"):
        Flickr8k.download(tmp_path / "to", url=server.url)


def test_checksum_is_recorded_and_compared(server, tmp_path):
    Flickr8k.download(tmp_path / "to", url=server.url)
    record = json.loads((tmp_path / "to.sha256.json").read_text())
    assert set(record) == {"Flickr8k_text.zip", "Flickr8k_Dataset.zip"}
    os.rename(tmp_path / "to" / "Flickr8k_text", tmp_path / "old")
    server.files["Flickr8k_text.zip"] = archive({"a.txt": b"another"})
    with pytest.raises(InvalidError, match=record["Flickr8k_text.zip"]):
        Flickr8k.download(tmp_path / "to", url=server.url)
    assert not (tmp_path / "to" / "Flickr8k_text").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../../evil.txt": b"x"}, "leads out"),
        ({"/etc/evil.txt": b"x"}, "leads out"),
        ({"..\\evil.txt": b"x"}, "leads out"),
        ({"a/x.txt": b"x", "b/x.txt": b"y"}, "twice"),
        ({"x.png": b"x"}, r"no \.txt files"),
        ({"x.txt": b"x" * 2000}, "larger"),
        (None, "damaged and was deleted"),
    ],
)
def test_hostile_archive(server, tmp_path, monkeypatch, members, message):
    monkeypatch.setattr("effbench_tasks.flickr.unpack.MAX_BYTES", 1000)
    server.files["Flickr8k_text.zip"] = archive(members) if members else b"<html>sign in</html>"
    with pytest.raises(InvalidError, match=message):
        Flickr8k.download(tmp_path / "a" / "b" / "to", url=server.url)
    left = [file.name for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert not any("evil" in name for name in left) and "to.sha256.json" not in left


def test_flipped_bit_in_an_archive(server, tmp_path):
    raw = bytearray(server.files["Flickr8k_text.zip"])
    raw[raw.index(b"A dog")] ^= 1
    server.files["Flickr8k_text.zip"] = bytes(raw)
    with pytest.raises(InvalidError, match="damaged"):
        Flickr8k.download(tmp_path / "to", url=server.url)
    assert not (tmp_path / "to" / "Flickr8k_text").exists()
