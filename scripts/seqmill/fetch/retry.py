"""Waits before a download is tried again, if its trouble may pass."""

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

WAITS = (5.0, 15.0, 45.0)  # seconds before each further try
OFFLINE_WAITS = 2  # as many of them without a connection: a user who is offline must know within a minute
LONGEST_WAIT = 300.0  # seconds, that a server may ask for; the Hugging Face Hub counts requests in 5 minutes

log = logging.getLogger(__name__)


class Transient(Exception):
    """A download has failed for a reason that may pass."""

    def __init__(self, reason: str, is_offline: bool = False, asked: float = 0.0) -> None:
        """Keep the reason, whether there was no connection at all, and the seconds that the server asks to wait."""
        super().__init__(reason)
        self.is_offline, self.asked = is_offline, asked


class Patience:
    """The waits of one fetch; its sources share them, so that the second does not wait as long again."""

    def __init__(self) -> None:
        self._waited = 0

    def wait(self, url: str, trouble: Transient) -> bool:
        """Wait before another try, and say so in one line; return False at once if it was tried often enough."""
        number = self._waited
        if number >= (OFFLINE_WAITS if trouble.is_offline else len(WAITS)) or trouble.asked > LONGEST_WAIT:
            return False
        self._waited += 1
        seconds = max(WAITS[number], trouble.asked)
        log.warning("%s: %s; trying again in %.0f s", url, trouble, seconds)
        time.sleep(seconds)
        return True

    def renew(self) -> None:
        """Allow all waits again, after a try that has received more than those before."""
        self._waited = 0


def seconds_asked(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After, which may be a number or a date; 0 without a valid one."""
    text = headers.get("Retry-After", "")
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0
