"""Showing how far runs have come: a table that is drawn in place on a terminal, else a line for what has changed."""

from __future__ import annotations

import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO

from seqmill.base.locks import is_locked
from seqmill.base.words import in_one_line, time_in_words
from seqmill.errors import SeqmillError
from seqmill.run.orphans import IN_USE
from seqmill.run.progress import STALE, UNREADABLE, WAITING, Progress, progress_of
from seqmill.store.layout import root_of
from seqmill.store.status import COMPLETE, FAILED, RUNNING

SHOWN_NOTES = 5
STATES = (RUNNING, STALE, FAILED, UNREADABLE, WAITING)
STILL_ALIVE = "  the workflow in this folder has not ended yet"
UP, CLEAR_LINE, CLEAR_BELOW = "\x1b[{}A", "\x1b[K", "\x1b[J"  # ANSI: so many lines, to the right, below


def watch(results: Path, interval: float, once: bool, out: TextIO) -> None:
    """Show how far runs have come until all are merged and no workflow is alive that might begin them anew.

    On a terminal a table is drawn in place, else there is a line for what has changed.

    Args:
        results: as for `progress_of`.
        interval: seconds between two looks.
        once: look once, print all and end.
        out: where to write.

    Raises:
        SeqmillError: no such folder; with `once` also one without runs.
    """
    drawn = 0
    said: dict[str, object] = {}
    while True:
        runs = progress_of(results)
        if once and not runs:
            raise SeqmillError(f"{in_one_line(results)}: no run has begun in this folder")
        merged = bool(runs) and all(run.merged for run in runs)
        alive = merged and not once and in_use(runs)
        if once:
            print("\n".join(table(runs)), file=out)
        elif out.isatty():
            lines = table(runs) or [f"{in_one_line(results)}: no run has begun yet"]
            drawn = _draw([*lines, STILL_ALIVE] if alive else lines, drawn, out)
        else:
            _say_changes(runs or [Progress(f"{results}: no run yet")], said, out)
        if once or (merged and not alive):
            return
        time.sleep(interval)


def in_use(runs: list[Progress]) -> bool:
    """Return whether a workflow is alive where these results lie, by the lock of `orphans.claim_folder`.

    False as well where that can't be told.
    """
    return any(is_locked(folder / IN_USE) for folder in {root_of(run.folder) for run in runs})


def _draw(lines: list[str], drawn: int, out: TextIO) -> int:
    """Draw lines over the `drawn` ones before; return how many, which are no more than the terminal has."""
    width, height = shutil.get_terminal_size()
    lines = [line[: width - 1] for line in lines[: height - 1]]
    out.write((UP.format(drawn) if drawn else "") + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW)
    out.flush()
    return len(lines)


def _say_changes(runs: list[Progress], said: dict[str, object], out: TextIO) -> None:
    """Print a line for each run that is no longer as it was said to be."""
    for run in runs:
        seen = (run.shards, sorted(run.states.items()), run.done, run.total, run.merged, run.missing)
        if said.get(run.name) != seen:
            said[run.name] = seen
            text = "; ".join([", ".join(filter(None, cells(run))), *run.notes[:SHOWN_NOTES]])
            print(f"{datetime.now():%H:%M:%S} {text}", file=out, flush=True)


def table(runs: list[Progress]) -> list[str]:
    """Return the runs as aligned lines, their sum if there are several, and what is to be said of shards."""
    rows = [cells(run) for run in ([*runs, total_of(runs)] if len(runs) > 1 else runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for run in runs:
        where = f"{in_one_line(run.name)}: " if len(runs) > 1 else ""
        lines += [f"  {where}{note}" for note in run.notes[:SHOWN_NOTES]]
        if len(run.notes) > SHOWN_NOTES:
            lines.append(f"  {where}and {len(run.notes) - SHOWN_NOTES} more shards")
    return lines


def total_of(runs: list[Progress]) -> Progress:
    """Return the sum of several runs; the longest of their times."""
    result = Progress("all", merged=all(run.merged for run in runs))
    for run in runs:
        result.shards += run.shards
        result.done += run.done
        result.total += run.total
        result.resumed, result.rate = result.resumed + run.resumed, result.rate + run.rate
        for state, number in run.states.items():
            result.states[state] = result.states.get(state, 0) + number
    if result.rate:
        left = (result.total.tokens - result.done.tokens) / result.rate
        result.seconds = max(left, *(run.seconds for run in runs if run.rate))
    return result


def cells(run: Progress) -> list[str]:
    """Return what is shown of a run, from its name to the time that is left."""
    if run.missing:
        return [in_one_line(run.name), "", run.missing, "", "", "", ""]
    states = [f"{number} {state}" for state in STATES if (number := run.states.get(state))]
    shards = ", ".join([f"{run.states.get(COMPLETE, 0)} of {run.shards} shards done", *states])
    share = f"{100 * run.done.tokens // run.total.tokens} %" if run.total.tokens else ""
    packs = f"{run.done.packs}/{run.total.packs} packs" + (f" ({run.resumed} resumed)" if run.resumed else "")
    tokens = f"{_short(run.done.tokens)}/{_short(run.total.tokens)} tokens"
    rate = f"{_short(round(run.rate))} tokens/s" if run.rate else ""
    left = f"{time_in_words(run.seconds)} left" if run.rate else ""
    if run.shards and run.states.get(COMPLETE, 0) == run.shards:
        left = "not merged yet"
    if run.merged:
        left = "merged"
    return [in_one_line(run.name), share, shards if run.shards else "no shard begun", packs, tokens, rate, left]


def _short(number: float) -> str:
    """Return a number in four characters or so, as 20.7k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"
