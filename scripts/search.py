#!/usr/bin/env python3
"""Launches seqmill.cli.search; usable without installing the package."""

import sys

from seqmill.cli.search import main

if __name__ == "__main__":
    sys.exit(main())
