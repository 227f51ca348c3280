"""Numbers, times and messages as text for people."""

import math
from datetime import datetime

MESSAGE = 400  # characters shown of a message


def ago(when: str) -> str:
    """Return how long ago an ISO 8601 time was."""
    try:
        seconds = (datetime.now().astimezone() - datetime.fromisoformat(when).astimezone()).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return "at an unknown time"
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def in_one_line(message: object) -> str:
    """Return a message as one line of bounded length; characters that could steer a terminal are escaped."""
    text = " ".join(str(message).split())
    text = text if len(text) <= MESSAGE else f"{text[:MESSAGE]} ..."
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def size_in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def time_in_words(seconds: float) -> str:
    """Write a duration in at most two units: days and hours, or hours and minutes."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def written(value: float | None, form: str) -> str:
    """Format a number; None gives an empty string."""
    return "" if value is None else form.format(value)


def percent(share: float) -> str:
    """Write a share, from 0 to 1, in percent."""
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def decimal(value: float) -> str:
    """Write a number, with one decimal if it is below 100 and not whole."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def many(count: int, noun: str) -> str:
    """Write a count and its noun, in the singular or plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
