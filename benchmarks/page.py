"""How soon can the leaderboard's web page be used, and how large is it?

    python benchmarks/page.py
    python benchmarks/page.py --rows 5000 --keep /tmp/page

Made records, spread over ten envelopes and several runs, give as many rows as asked for. A headless Chromium opens the
page from a file; as soon as the table is there its second heading is pressed, and the time stands at which the sorted
table has been painted. Then the first plot is scrolled to. The bar: sorted within 2 s of opening with 1,000 rows.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table
from selenium import webdriver

from effbench.records import (
    Arm,
    Envelope,
    Flops,
    Interval,
    Memory,
    MetricValue,
    Protocol,
    Provenance,
    Record,
    Speedup,
    TimeSplit,
)
from effbench.report import html

ENVELOPES = 10
RUNS = 5
#: runs before any script of the page; presses a heading when the table says that it is ready
PRESS = """
new PerformanceObserver((list) => {
  if (!list.getEntriesByName("effbench-table").length || window.pressed) return;
  window.pressed = true;
  document.querySelectorAll("#board thead button")[2].click();
  requestAnimationFrame(() => requestAnimationFrame(() => { window.sorted = performance.now(); }));
}).observe({ type: "mark", buffered: true });
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder in which the page stays")
    asked = parser.parse_args()
    records = made(asked.rows)
    started = time.process_time()
    text = html.render(records, [])
    spent = time.process_time() - started
    folder = asked.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(text, encoding="utf-8")
    table = Table("run", "table ready ms", "sorted and painted ms", "first plot after scrolling ms")
    for number in range(asked.repeats):
        table.add_row(str(number + 1), *(f"{value:.0f}" for value in opened(folder / "index.html")))
    console = Console()
    console.print(table)
    data = len(text) - len(html._plotly())
    console.print(
        f"{asked.rows:,} rows of {len(records)} records: written in {spent:.2f} s of CPU, {len(text) / 2**20:.1f} MiB, "
        f"{data / 2**20:.2f} MiB of it not plotly.js"
    )
    if not asked.keep:
        shutil.rmtree(folder)


def opened(page: Path) -> tuple[float, float, float]:
    """Milliseconds of one fresh browser: until the table is ready, until it is sorted, and of the first plot."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for each in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(each)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PRESS})
        browser.get(page.resolve().as_uri())
        wait = "return window.sorted && performance.getEntriesByName('effbench-table')[0].startTime"
        while not (ready := browser.execute_script(wait)):
            time.sleep(0.05)
        done = browser.execute_script("return window.sorted")
        browser.execute_script("window.from = performance.now(); document.getElementById('pareto').scrollIntoView()")
        painted = "return document.querySelector('.plot .scatterlayer') && performance.now() - window.from"
        while not (plot := browser.execute_script(painted)):
            time.sleep(0.02)
        return ready, done, plot
    finally:
        browser.quit()


def made(rows: int) -> list[Record]:
    """Records whose leaderboard has about that many rows."""
    arms = max(1, rows // ENVELOPES - 2)
    return [
        _record(envelope, run, arms) for envelope in range(min(ENVELOPES, max(1, rows // 3))) for run in range(RUNS)
    ]


def _record(envelope: int, run: int, arms: int) -> Record:
    data = dict(images={"test": 1000}, captions={"test": 5000}, metrics=("t2i_r10",), transform="resize 224 bicubic")
    return Record(
        id=f"run-{envelope}-{run}",
        created=datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=envelope + 30 * run),
        primary_metric="t2i_r10",
        envelope=Envelope(
            task="flickr8k",
            data="flickr8k",
            data_fingerprint="f00",
            backbone=f"timm:vit_{envelope}",
            weights="ab" * 32,
            protocol=Protocol(threads=2),
            device_model="Some CPU @ 2.0 GHz",
            **data,
        ),  # fmt: skip
        provenance=Provenance(command="effbench run --method token_prune --task flickr8k", effbench="0.1.0"),
        arms=(
            _arm("baseline", "", "baseline", 0, run),
            _arm("noop", "noop", "control", 0, run, control="noop"),
            *(_arm(f"token_prune:keep={n / arms:.4f}", None, "method", n, run) for n in range(1, arms + 1)),
        ),
    )


def _arm(name: str, spec: str | None, kind: str, n: int, run: int, control: str = "") -> Arm:
    speed, loss = 1 + (n * 37 % 101) / 100 + run / 200, (n * 53 % 97) / 200
    found = Speedup(value=speed, low=0.96 * speed, high=1.05 * speed, n=30, verdict="FASTER" if n else "NO DIFFERENCE")
    lossiness = Interval(value=loss, low=loss - 0.01, high=loss + 0.012, n=1000)
    metric = MetricValue(value=50 * (1 - loss), low=49 * (1 - loss), high=51 * (1 - loss), higher_is_better=True)
    return Arm(
        name=name, spec=name if spec is None else spec, kind=kind, control=control,
        source="DynamicViT, arXiv 2106.02034", test_speedup=found if kind != "baseline" else None, promised=1.5,
        realised=speed / 1.5, step_time=TimeSplit(total=1.0, compute=0.9, image=0.7, text=0.1, head=0.1, steps=15),
        test_flops=Flops(dense=2_510_000_000 // (1 + n % 7)), parameters=9_180_000, weight_bytes=36_700_160,
        memory=Memory(weights=36_700_160, load_peak=60_000_000, run_peak=412_000_000, tensor_peak=90_000_000 + n),
        tokens=tuple(197 - n % 11 * layer for layer in range(12)),
        metrics={"t2i_r10": metric if kind == "baseline" else metric.model_copy(update=dict(lossiness=lossiness))},
    )  # fmt: skip


if __name__ == "__main__":
    main()
