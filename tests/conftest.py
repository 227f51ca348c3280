"""Paths for the tests: the package lies in scripts/, helpers of the tests beside this file."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent / "scripts"), str(TESTS)]
