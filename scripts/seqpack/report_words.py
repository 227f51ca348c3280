"""Numbers in words, and the report's tables and figures; whatever comes from files is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

TEXT_COLUMNS = ("what was done", "device", "audit")  # the others hold numbers


def figure(chart: str, caption: str) -> str:
    """Return a chart (HTML) with its caption (text)."""
    return f"<figure>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


def facts(rows: Iterable[tuple[str, str]], code: bool = False) -> str:
    """Return a table of names and values (text); values that are empty are left out, `code` is for digests."""
    tag = "code" if code else "span"
    lines = [f"<tr><td>{escape(name)}</td><td><{tag}>{escape(text)}</{tag}></td></tr>" for name, text in rows if text]
    return "\n".join(['<table class="facts">', *lines, "</table>"])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text, one header a column."""
    kinds = ["" if name in TEXT_COLUMNS else ' class="n"' for name in header]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in pairs) + "</tr>"

    return "\n".join(["<table>", line("th", header), *(line("td", row) for row in rows), "</table>"])


def written(value: float | None, form: str) -> str:
    """Write a number; nothing if there is none."""
    return "" if value is None else form.format(value)


def percent(share: float) -> str:
    """Write a share, from 0 to 1, in percent."""
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def decimal(value: float) -> str:
    """Write a number with a decimal where that says something."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def many(count: int, noun: str) -> str:
    """Write so many of something, in singular or plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
