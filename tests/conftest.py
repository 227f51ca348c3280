"""Test settings. `pythonpath` in pyproject.toml says where modules are found."""

import os
import signal
import tempfile
from collections.abc import Generator

import pytest

from seqmill.base.cuda import installed_torch

try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU may have torch and pytest only (tests/gpu)
    pass
else:
    # Use the same examples in every run, so that a rare failure shows in the change that causes it.
    settings.register_profile("same", derandomize=True, database=None, deadline=None)
    settings.load_profile("same")

# A shell starts background jobs with SIGINT ignored; the programs that the tests stop would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The weights that a developer has fetched must not decide what the tests see. The folder is removed at exit.
NO_WEIGHTS = tempfile.TemporaryDirectory()
os.environ["SEQMILL_MODELS"] = NO_WEIGHTS.name


# A CPU build of torch beside a developer's GPU is an error, except where a test sets the variable itself.
if installed_torch() and not installed_torch()[1]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape non-UTF-8 bytes in captured output, such as paths, because pytest-xdist can't send them."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
