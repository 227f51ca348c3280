"""How many tokens a worker had computed by when: few points, however long it works."""

from __future__ import annotations

MOST_POINTS = 120


class Throughput:
    """Takes a point as often as packs are done, and keeps few of them, about evenly spaced.

    Attributes:
        points: [seconds since the beginning, tokens computed by then], both increasing, the first [0, 0]; changed in
            place, so that a status that holds them is up to date.
    """

    def __init__(self) -> None:
        self.points: list[list[float]] = [[0.0, 0]]
        self._interval = 0.0

    def add(self, seconds: float, num_tokens: int, is_last: bool = False) -> None:
        """Take a point, unless it comes too soon after the one before; the last is always taken."""
        if seconds - self.points[-1][0] < self._interval and not is_last:
            return
        self.points.append([round(seconds, 2), num_tokens])
        if len(self.points) > MOST_POINTS:
            del self.points[1::2]
            self._interval = seconds / len(self.points)
