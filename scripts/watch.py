#!/usr/bin/env python3
"""Show how far runs have come, here or on a cluster, until they are complete; change nothing."""

import sys

from seqpack.watch import main

if __name__ == "__main__":
    sys.exit(main())
