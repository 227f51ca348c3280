"""Paths for the tests: the package lies in scripts/, helpers of the tests beside this file."""

import sys
from pathlib import Path

from hypothesis import settings

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent / "scripts"), str(TESTS)]

# The same examples in every run: a rare one that fails is to fail where the change was made.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")
