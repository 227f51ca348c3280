"""An option of the rehearsal."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-kernels", action="store_true", help="of test_ahead_of_time.py all launches, not a sample")
