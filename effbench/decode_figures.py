"""From raw samples to how an arm writes: time to the first token and of each further one. Nothing is measured here.

A timed step is cut where the second token begins, so that first token + (tokens - 1) x time per token = step.
"""

from __future__ import annotations

import pandas as pd

from effbench import records, speeds


def timed(found: tuple[records.Decoding, ...], rows: pd.DataFrame, arm: str) -> tuple[records.Decoding, ...]:
    """What is known of an arm's writing, with its times and paired speed-ups at each batch size that was timed.

    Args:
        rows: samples of all arms (see `effbench.samples`).
    """
    return tuple(each.model_copy(update=_times(each, rows, arm)) for each in found)


def _times(known: records.Decoding, rows: pd.DataFrame, arm: str) -> dict[str, float | records.Speedup | None]:
    baseline, own = (_cut(speeds.timed(rows, name, known.batch)) for name in ("baseline", arm))
    if not len(own):
        return {}
    further = known.tokens - 1
    typical = speeds.middle(own)
    facts: dict[str, float | records.Speedup | None] = dict(first_token=float(typical["first"].mean()))
    if further:
        facts["per_token"] = float(typical["decode_seconds"].mean()) / further
    if arm != "baseline":
        facts["first_token_speedup"] = speeds.speedup(baseline, own, "first")
        facts["per_token_speedup"] = speeds.speedup(baseline, own, "decode_seconds") if further else None
    return facts


def _cut(steps: pd.DataFrame) -> pd.DataFrame:
    """Steps with the seconds up to the second token, "first"."""
    return steps.assign(first=steps["seconds"] - steps["decode_seconds"])
