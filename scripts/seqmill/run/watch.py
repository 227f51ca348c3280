"""Shows how far runs have come: a table drawn in place on a terminal, else a line for each change."""

import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table

from seqmill.base.locks import is_locked
from seqmill.base.words import in_one_line, time_in_words
from seqmill.errors import SeqmillError
from seqmill.run.progress import Progress, progress_of
from seqmill.run.shard_state import STALE, UNREADABLE, WAITING
from seqmill.run.slurm_jobs import IN_USE
from seqmill.store.status import COMPLETE, FAILED, RUNNING

SHOWN_NOTES = 5
STATES = (RUNNING, STALE, FAILED, UNREADABLE, WAITING)
STILL_ALIVE = "  the workflow in this folder has not ended yet"
ANY_WIDTH = 10_000  # columns, where lines are not to be wrapped


def watch(results: Path, interval: float, once: bool, out: TextIO) -> None:
    """Show how far runs have come until all are merged and no workflow is alive that might start them again.

    It looks every `interval` seconds, or only `once`; `results` as for `progress_of`. Raise a SeqmillError if there is
    no such folder; with `once` also if no run has begun there.
    """
    console = console_of(out)
    if once:
        runs = progress_of(results)
        if not runs:
            raise SeqmillError(f"{in_one_line(results)}: no run has begun in this folder")
        console.print(table(runs))
    elif console.is_terminal and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for runs, is_alive in _looks(results, interval):
                shown = table(runs) if runs else f"{in_one_line(results)}: no run has begun yet"
                live.update(Group(shown, STILL_ALIVE) if is_alive else shown, refresh=True)
    else:
        printed: dict[str, Progress] = {}
        for runs, _ in _looks(results, interval):
            _print_changes(runs or [Progress(f"{results}: no run yet")], printed, out)


def print_progress(results: Path, names: Collection[str], interval: float, out: TextIO) -> NoReturn:
    """Print a line every `interval` seconds for each of the runs `names`, DATASET/MODEL, that computes shards.

    For a thread next to Snakemake, which prints nothing while a shard runs. A file that can't be read now may be
    readable at the next look.
    """
    printed: dict[str, Progress] = {}
    while True:
        time.sleep(interval)
        with suppress(SeqmillError, OSError):
            runs = [run for run in progress_of(results) if run.name in names and run.states[RUNNING]]
            _print_changes(runs, printed, out)


def console_of(out: TextIO) -> Console:
    """Return a console that takes no text for markup, and wraps lines on a terminal only."""
    is_terminal = out.isatty()
    width = None if is_terminal else ANY_WIDTH
    return Console(file=out, force_terminal=is_terminal, width=width, markup=False, emoji=False, highlight=False)


def _looks(results: Path, interval: float) -> Iterator[tuple[list[Progress], bool]]:
    """Yield the runs at each look, and whether all are merged but their workflow is still alive."""
    while True:
        runs = progress_of(results)
        merged = bool(runs) and all(run.merged for run in runs)
        is_alive = merged and any(is_locked(root / IN_USE) for root in {run.root for run in runs})
        yield runs, is_alive
        if merged and not is_alive:
            return
        time.sleep(interval)


def _print_changes(runs: list[Progress], printed: dict[str, Progress], out: TextIO) -> None:
    """Print a line for each run that has changed since it was printed."""
    for run in runs:
        if printed.get(run.name) != run:
            printed[run.name] = run
            text = "; ".join([", ".join(filter(None, cells(run))), *run.notes[:SHOWN_NOTES]])
            print(f"{datetime.now():%H:%M:%S} {text}", file=out, flush=True)


def table(runs: list[Progress]) -> Group:
    """Return a row per run, their sum if there are several, and the first notes on their shards."""
    # On a narrow terminal the cells take several lines; nothing is cut off.
    rows = Table.grid(*(Column(overflow="fold") for _ in range(7)), padding=(0, 2, 0, 0))
    for run in [*runs, total_of(runs)] if len(runs) > 1 else runs:
        rows.add_row(*cells(run))
    notes = []
    for run in runs:
        where = f"  {in_one_line(run.name)}: " if len(runs) > 1 else "  "
        notes += [f"{where}{note}" for note in run.notes[:SHOWN_NOTES]]
        if len(run.notes) > SHOWN_NOTES:
            notes.append(f"{where}and {len(run.notes) - SHOWN_NOTES} more shards")
    return Group(rows, *notes)


def total_of(runs: list[Progress]) -> Progress:
    """Return the sum of several runs; the longest of their times."""
    result = Progress("all", merged=all(run.merged for run in runs))
    for run in runs:
        result.shards += run.shards
        result.states.update(run.states)
        result.done += run.done
        result.total += run.total
        result.resumed, result.rate = result.resumed + run.resumed, result.rate + run.rate
    if result.rate:
        left = (result.total.tokens - result.done.tokens) / result.rate
        result.seconds = max(left, *(run.seconds for run in runs if run.rate))
    return result


def cells(run: Progress) -> list[str]:
    """Return the cells of a run's row, from its name to the time left."""
    if run.missing:
        return [in_one_line(run.name), "", run.missing, "", "", "", ""]
    states = [f"{number} {state}" for state in STATES if (number := run.states.get(state))]
    shards = ", ".join([f"{run.states.get(COMPLETE, 0)} of {run.shards} shards done", *states])
    share = f"{100 * run.done.tokens // run.total.tokens} %" if run.total.tokens else ""
    packs = f"{run.done.packs}/{run.total.packs} packs"
    packs += f" ({run.resumed} by earlier attempts)" if run.resumed else ""
    tokens = f"{_short(run.done.tokens)}/{_short(run.total.tokens)} tokens"
    rate = f"{_short(round(run.rate))} tokens/s" if run.rate else ""
    left = f"{time_in_words(run.seconds)} left" if run.rate else ""
    if run.shards and run.states.get(COMPLETE, 0) == run.shards:
        left = "not merged yet"
    if run.merged:
        left = "merged"
    return [in_one_line(run.name), share, shards if run.shards else "no shard begun", packs, tokens, rate, left]


def _short(number: float) -> str:
    """Return a number in about four characters, as 20.7k."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.0f}"
