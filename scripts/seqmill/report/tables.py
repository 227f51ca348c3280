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
