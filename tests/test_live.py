import io
import re
import threading
import time

import pytest
from rich.console import Console

from effbench import live
from effbench.live import Live

ARMS = {"baseline": {"step s": 0.21234, "loss": 3.4}, "token_prune:keep=0.5": {"step s": 0.11, "status": "ok"}}


def plain():
    file = io.StringIO()
    return Live(Console(file=file, width=80)), file


def terminal(**options):
    file = io.StringIO()
    return Live(Console(file=file, width=100, force_terminal=True, force_interactive=True, **options)), file


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_per_ten_seconds_and_one_at_the_end(clock):
    show, file = plain()
    with show:
        show.stage("training", 40)
        for done in range(1, 41):
            clock[0] += 1
            show.advance(done, ARMS)
    lines = file.getvalue().splitlines()
    heads = [line for line in lines if line.startswith("training")]
    assert len(heads) == 4 and heads[0] == "training: 10/40 steps, 25 %, 0:10 elapsed, 0:30 left"
    assert heads[-1] == "training: 40/40 steps, 100 %, 0:40 elapsed"
    assert lines[-len(ARMS)].startswith("    baseline") and "0.2123" in lines[-len(ARMS)]


@pytest.mark.parametrize("make", [plain, terminal])
def test_of_many_arms_the_first_and_the_failed_are_told(make):
    show, file = make()
    arms = {f"arm{i}": {"step s": 1.0} for i in range(30)} | {"broken": {"status": "FAILED"}}
    with show:
        show.stage("training", 1)
        show.advance(1, arms)
    text = file.getvalue()
    assert "arm11 " in text and "arm12" not in text and "FAILED" in text and "and 18 more arms" in text


def test_plain_text_is_ascii_and_has_no_control_characters():
    show, file = plain()
    with show:
        show.banner("données", ["no real copy\x1b[31m of [red]flickr8k[/red]", "→ run: effbench data get flickr8k"])
        show.warn("naïve\nsecond")
        show.note("ok")
    text = file.getvalue()
    assert text.isascii() and "\x1b" not in text and "[red]flickr8k[/red]" in text
    lines = text.splitlines()
    assert lines[-2:] == ["warning: na\\xefve second", "ok"]
    assert len({len(line) for line in lines[:-2]}) == 1 and set(lines[0]) == {"#"}


def test_data_building_reports_by_callback(clock):
    show, file = plain()
    for done in range(0, 101):
        clock[0] += 0.5
        show.progress("decoding images", done, 100)
    show.progress("hashing", 1, 1)
    lines = file.getvalue().splitlines()
    assert 5 <= len(lines) <= 7 and lines[-1].startswith("decoding images: 100/100, 100 %, 0:50 elapsed")


def test_a_terminal_shows_bar_table_and_banner_and_leaves_the_last_state():
    show, file = terminal(no_color=True)
    with show:
        show.banner("NO REAL DATA", ["running on scenes"])
        show.stage("training", 10)
        show.advance(10, ARMS)
        show.warn("arm [x] FAILED")
    text = file.getvalue()
    last = text[text.rindex("training") :]
    assert "NO REAL DATA" in text and "10/10 steps" in last and "0.2123" in last and "token_prune:keep=0.5" in last
    assert "arm [x] FAILED" in text and not re.search(r"\x1b\[3[0-9]", text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_an_exception_restores_the_cursor():
    show, file = terminal()
    with pytest.raises(KeyboardInterrupt), show:
        show.stage("training", 10)
        raise KeyboardInterrupt
    assert file.getvalue().count("\x1b[?25h") == 1


def test_nothing_is_drawn_between_calls():
    show, file = terminal()
    threads = threading.active_count()
    with show:
        show.stage("training", 10)
        before = file.getvalue()
        time.sleep(0.6)
        assert file.getvalue() == before and threading.active_count() == threads
        show.advance(1, ARMS)
        assert file.getvalue() != before


def test_redraws_are_limited_to_four_a_second(clock):
    show, file = terminal()
    with show:
        show.stage("training", 10_000)
        drawn = []
        show._show = lambda: drawn.append(clock[0])
        for done in range(1000):
            clock[0] += 0.01
            show.advance(done, ARMS)
    assert 38 <= len(drawn) <= 41


def test_a_quiet_console_prints_nothing(capsys):
    with Live(Console(quiet=True)) as show:
        show.banner("x", ["y"])
        show.stage("training", 1)
        show.advance(1, ARMS)
    assert capsys.readouterr() == ("", "")


def test_progress_goes_to_stderr(capsys):
    with Live() as show:
        show.stage("empty", 0)
        show.note("hello")
    out, err = capsys.readouterr()
    assert out == "" and "hello" in err and "empty: 0/0 steps, 100 %" in err
