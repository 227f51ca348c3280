"""Settings of the tests. Where modules are found: `pythonpath` in pyproject.toml."""

from collections.abc import Generator

import pytest
from hypothesis import settings

# The same examples in every run: a rare one that fails is to fail where the change was made.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is not UTF-8 in captured output, as in paths: pytest-xdist can't send it."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
