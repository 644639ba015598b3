"""Runs without a record yet, as `effbench list runs` shows them."""

import io
import os
import subprocess
import sys

from rich.console import Console

from effbench import listing, unfinished

HELD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire(timeout=0)
print("held", flush=True)
time.sleep(60)
"""


def started(root, digest, **facts):
    folder = root / ".partial" / digest
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    about = dict(task="scenes", data="scenes", backbone="timm:tiny", arms=("token_prune",), command="effbench run --x")
    unfinished.note(folder, unfinished.About(**about | facts))
    return folder


def shown(root):
    console = Console(width=160, file=io.StringIO())
    listing.runs(root, console)
    return console.file.getvalue()


def test_an_interrupted_run_is_shown_with_the_command_that_goes_on(tmp_path):
    folder = started(tmp_path, "0123456789ab")
    (folder / "checkpoint.pt").write_bytes(b"x")
    os.utime(folder / "checkpoint.pt", (86400, 86400))
    text = shown(tmp_path)
    state = "interrupted" if os.path.exists("/proc/locks") else "unfinished"
    assert f"0123456789ab  {state}, last saved 1970-01-02 00:00  scenes on scenes, timm:tiny: token_prune" in text
    assert "to go on: effbench run --x" in text and "no run in" not in text


def test_a_run_under_way_is_told_apart(tmp_path):
    folder = started(tmp_path, "0123456789ab")
    child = subprocess.Popen([sys.executable, "-c", HELD, folder / "lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        (run,) = unfinished.runs(tmp_path)
        assert run.saved is None and run.state == ("running" if os.path.exists("/proc/locks") else "unfinished")
    finally:
        child.kill()
        child.communicate()
    assert unfinished.runs(tmp_path)[0].state != "running"


def test_what_somebody_else_put_there_is_text_or_not_known(tmp_path):
    started(tmp_path, "evil", task="[red]x\x1b[31m", command="rm\x07 -rf")
    for name, content in (("cut", '{"task": "sc'), ("more", '{"run": 1}'), ("long", '{"task": "' + "x" * 9000 + '"}')):
        folder = started(tmp_path, name)
        (folder / "about.json").write_text(content)
    pipe = started(tmp_path, "pipe")
    (pipe / "about.json").unlink()
    os.mkfifo(pipe / "about.json")
    (tmp_path / ".partial" / "link").symlink_to(pipe)
    found = {run.digest: run.about for run in unfinished.runs(tmp_path)}
    assert set(found) == {"evil", "cut", "more", "long", "pipe"} and [name for name in found if found[name]] == ["evil"]
    text = shown(tmp_path)
    assert "[red]x" in text and "\x1b" not in text and "\x07" not in text and text.count("of what is not known") == 4


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path):
    unfinished.note(tmp_path / "nowhere", unfinished.About())
    assert unfinished.runs(tmp_path) == []
