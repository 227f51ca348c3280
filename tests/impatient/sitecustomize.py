"""On PYTHONPATH, with scripts/, it makes downloads wait for milliseconds before they try again."""

import seqmill.fetch.retry

seqmill.fetch.retry.WAITS = (0.01, 0.02, 0.03)
