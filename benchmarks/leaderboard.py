"""How long a leaderboard takes, and how much memory: seconds and peak MiB of `effbench leaderboard` on made records.

    python benchmarks/leaderboard.py --records 10000
    python benchmarks/leaderboard.py --records 100000 --envelopes 50 --folder /tmp/many

The records are copies of one real record with another id, time and speed-up, as runs of one machine would leave them;
they are kept in --folder, so that a second call measures alone. Goal on two cores: 10,000 in 5 s and 1 GiB, 100,000 in
40 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "scenes" / "record.json"
ARMS = 5


def make(root: Path, count: int, envelopes: int, source: Path) -> None:
    """Write the records that are not there yet; of each only `record.json`."""
    draw = random.Random(0)
    record = json.loads(source.read_text())
    record |= dict(id="@id", created="@created", wall_time="@wall", arms=record["arms"][:ARMS], status="ok")
    record["envelope"]["protocol"]["seeds"] = ["@seed"]
    for place, arm in enumerate(record["arms"]):
        if arm["test_speedup"]:
            arm["test_speedup"].update(value=f"@{place} value", low=f"@{place} low", high=f"@{place} high")
    pieces = re.split('"@([^"]*)"', json.dumps(record, indent=1))
    begun = datetime(2026, 1, 1)
    for i in range(count):
        created = begun + timedelta(seconds=i)
        name = f"{created:%Y%m%d-%H%M%S}-scenes-{i:08x}"
        folder = root / "records" / name
        values = dict(id=f'"{name}"', created=f'"{created:%Y-%m-%dT%H:%M:%SZ}"', wall=60 + i / 1000, seed=i % envelopes)
        for place in range(ARMS):
            scale = draw.uniform(0.97, 1.5)
            values |= {f"{place} value": scale, f"{place} low": 0.96 * scale, f"{place} high": 1.04 * scale}
        if folder.exists():
            continue
        folder.mkdir(parents=True)
        text = "".join(str(values[piece]) if n % 2 else piece for n, piece in enumerate(pieces))
        (folder / "record.json").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--envelopes", type=int, default=20)
    parser.add_argument("--source", type=Path, default=REFERENCE, help="the record that is copied")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one, removed at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        make(root, options.records, options.envelopes, options.source)
        size = sum(path.stat().st_size for path in (root / "records").glob("*/record.json"))
        begun = time.monotonic()
        command = [sys.executable, "-m", "effbench", "leaderboard", "--out", str(root)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wall, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{options.records} records of {size / options.records / 1024:.0f} KiB in {options.envelopes} envelopes: "
            f"{wall:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU, peak {used.ru_maxrss / 1024:.0f} MiB"
        )


if __name__ == "__main__":
    main()
