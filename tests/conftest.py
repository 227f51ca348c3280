"""Settings of the tests. Where modules are found: `pythonpath` in pyproject.toml."""

from hypothesis import settings

# The same examples in every run: a rare one that fails is to fail where the change was made.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")
