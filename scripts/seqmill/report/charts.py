"""Charts of the report as SVG: drawn here, so that the page shows them at once, in print and without scripts."""

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH = 760
LEFT, RIGHT, BOTTOM = 70, 14, 46
BAR_HEIGHT, BAR_PITCH = 14, 24
LABEL_WIDTH, VALUE_WIDTH = 170, 170
X_TICKS = (WIDTH - LEFT - RIGHT) // 90  # about 90 pixels for each
MAP_SIZE = (WIDTH, 600)
MINUS = "\u2212"

Scale = Callable[[float], float]


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    x_title: str,
    y_title: str,
    is_log: bool = False,
    mark: tuple[float, str] | None = None,
    percent: bool = False,
    height: int = 260,
) -> str:
    """Draw columns from edges[k] to edges[k + 1], as high as counts[k]; titles with units, the height in pixels.

    The x axis may be logarithmic, or have shares to be written in percent. `mark` is a value to draw a line at, and
    what it is.
    """
    top, bottom = 22, height - BOTTOM
    place = _scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT, is_log)
    most = max(*counts, 0, 1e-9) if len(counts) > 1 else max(counts[0], 1e-9)
    y_ticks = ticks(0, most, 4)
    rise = _scale(0, max(most, y_ticks[-1]), bottom, top)
    parts = _grid(y_ticks, rise)
    columns = []
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        x, end = place(left), place(right)
        gap = 1 if end - x > 4 else 0
        columns.append(f"M{x:.1f} {bottom}V{rise(count):.1f}H{max(end - gap, x + 0.5):.1f}V{bottom}Z" if count else "")
    parts.append(f'<path class="fill" d="{"".join(columns)}"/>')
    x_ticks = (log_ticks if is_log else ticks)(edges[0], edges[-1], X_TICKS)
    labels = [(place(x), f"{100 * x:.0f} %" if percent else number(x)) for x in x_ticks]
    parts += [*_x_axis(labels, bottom, height - 6, x_title), _text(LEFT - 56, 12, y_title, "start", "title")]
    if mark and edges[0] < mark[0] < edges[-1]:
        x = place(mark[0])
        side = "end" if x > WIDTH / 2 else "start"
        parts.append(f'<path class="mark" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(_text(x + (4 if side == "end" else -4), top - 6, mark[1], side, "marked"))
    return _svg(height, parts, f"{y_title} by {x_title}")


def bars(rows: Sequence[tuple[str, float, str]], title: str) -> str:
    """Draw one bar per row: its label, its value (0 or more), and the value in words."""
    most = max((value for _, value, _ in rows), default=0) or 1
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    parts = []
    for place, (label, value, shown) in enumerate(rows):
        y = place * BAR_PITCH + 4
        length = room * value / most
        parts.append(_text(LABEL_WIDTH - 10, y + 11.5, label, "end"))
        if value:
            parts.append(
                f'<rect class="fill" x="{LABEL_WIDTH}" y="{y}" width="{max(length, 1):.1f}" height="{BAR_HEIGHT}"/>'
            )
        parts.append(_text(LABEL_WIDTH + length + 8, y + 11.5, shown, "start", "value"))
    return _svg(len(rows) * BAR_PITCH + 4, parts, title)


def steps(lines: Sequence[tuple[str, float, float, Sequence[float]]], x_title: str, y_title: str, kind: str) -> str:
    """Draw lines in steps over time; the x axis chooses its unit.

    A line is its title for pointers and screen readers, where it begins and how long a step is (seconds), and its
    values, 0 or more. The kind is `area`, filled to the axis, or `line`.
    """
    height, top = 220, 22
    bottom = height - BOTTOM
    last = max(begin + step * len(values) for _, begin, step, values in lines)
    most = max(max(values) for *_, values in lines) or 1
    place, rise = _scale(0, last, LEFT, WIDTH - RIGHT), _scale(0, most, bottom, top)
    parts = _grid(ticks(0, most, 4), rise)
    for title, begin, step, values in lines:
        path = "".join(f"V{rise(y):.1f}H{place(begin + step * k):.1f}" for k, y in enumerate(values, start=1))
        start = f"M{place(begin):.1f} {bottom if kind == 'area' else format(rise(values[0]), '.1f')}"
        end = f"V{bottom}Z" if kind == "area" else ""
        parts.append(f'<path class="{kind}" d="{start}{path}{end}"><title>{escape(title)}</title></path>')
    parts += [*_time_axis(last, place, bottom, x_title), _text(LEFT - 56, 12, y_title, "start", "title")]
    return _svg(height, parts, f"{y_title} over time")


def spans(rows: Sequence[tuple[str, float, float]], x_title: str) -> str:
    """Draw a line from begin to end a row: its label, and both in seconds."""
    pitch = min(BAR_PITCH, max(400 / len(rows), 1))
    thick = max(pitch * 0.6, 0.8)
    bottom = 4 + pitch * len(rows)
    last = max(end for _, _, end in rows) or 1
    place = _scale(0, last, LEFT, WIDTH - RIGHT)
    parts = []
    for row, (label, begin, end) in enumerate(rows):
        y = 4 + pitch * row
        width = max(place(end) - place(begin), 1)
        parts.append(
            f'<rect class="fill" x="{place(begin):.1f}" y="{y:.1f}" width="{width:.1f}" height="{thick:.1f}"/>'
        )
        if row % max(math.ceil(14 / pitch), 1) == 0:
            parts.append(_text(LEFT - 8, y + thick / 2 + 4, label, "end"))
    parts += _time_axis(last, place, bottom, x_title)
    return _svg(math.ceil(bottom) + 42, parts, x_title)


def _time_axis(last: float, place: Scale, bottom: float, title: str) -> list[str]:
    """Draw an axis of seconds from 0 to `last`, in the unit that suits them."""
    unit, name = next(
        (u, n) for u, n in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s")) if last > 3 * u or u == 1
    )
    labels = [(place(x * unit), number(x)) for x in ticks(0, last / unit, X_TICKS)]
    return _x_axis(labels, bottom, bottom + 38, f"{title} ({name})")


def _x_axis(labels: Sequence[tuple[float, str]], bottom: float, title_y: float, title: str) -> list[str]:
    parts = [f'<path class="axis" d="M{x:.1f} {bottom}v5"/>{_text(x, bottom + 19, shown)}' for x, shown in labels]
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, title_y, title, "middle", "title")]


def _grid(y_ticks: Sequence[float], rise: Scale) -> list[str]:
    """Draw a line for each value of the y axis, and write the value."""
    lines = "".join(f"M{LEFT} {rise(y):.1f}H{WIDTH - RIGHT}" for y in y_ticks)
    texts = (_text(LEFT - 8, rise(y) + 4, number(y), "end") for y in y_ticks)
    return [f'<path class="grid" d="{lines}"/>', *texts]


def map_axes(x: tuple[str, float, float], y: tuple[str, float, float]) -> tuple[str, dict[str, float]]:
    """Draw the axes of a map: of each its title, lowest and highest value.

    Return the SVG, and where in it the points lie: left, top, width, height, in percent of its size; and how far
    within that the outermost ones are, in percent of its width.
    """
    width, height = MAP_SIZE
    left, top, right, bottom = LEFT, 8, width - RIGHT, height - BOTTOM
    inset = 8  # so that points at the edge are seen in full
    across, up = (
        _scale(low, high, begin, end)
        for (_, low, high), begin, end in ((x, left + inset, right - inset), (y, bottom - inset, top + inset))
    )
    parts = [f'<path class="axis" d="M{left} {top}H{right}V{bottom}H{left}Z"/>']
    for value in ticks(x[1], x[2], 6):
        parts.append(f'<path class="axis" d="M{across(value):.1f} {bottom}v5"/>')
        parts.append(_text(across(value), bottom + 19, number(value)))
    for value in ticks(y[1], y[2], 6):
        parts.append(f'<path class="axis" d="M{left} {up(value):.1f}h-5"/>')
        parts.append(_text(left - 9, up(value) + 4, number(value), "end"))
    parts.append(_text((left + right) / 2, height - 6, x[0], "middle", "title"))
    middle = (top + bottom) / 2
    parts.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle + 4, y[0], "middle", "title")}</g>')
    place = {
        "left": 100 * left / width,
        "top": 100 * top / height,
        "width": 100 * (right - left) / width,
        "height": 100 * (bottom - top) / height,
        "inset": 100 * inset / (right - left),
    }
    return _svg(height, parts, f"axes of {x[0]} and {y[0]}"), place


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round values from low to high, by a step of 1, 2 or 5 times a power of ten, about `most` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.75 * rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten from low to high.

    If these are more than `most`, return 1 and 3 times the powers, or else only the powers.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= most:
            break
    return found


def number(value: float) -> str:
    """Write a number with thousands separators, a minus sign, and no more digits than it needs."""
    return (f"{int(value):,}" if value == int(value) else f"{value:.4g}").replace("-", MINUS)


def _scale(low: float, high: float, begin: float, end: float, is_log: bool = False) -> Scale:
    if is_log:
        inner = _scale(math.log(low), math.log(high), begin, end)
        return lambda value: inner(math.log(value))
    width = (high - low) or 1
    return lambda value: begin + (value - low) / width * (end - begin)


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
