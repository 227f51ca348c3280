#!/usr/bin/env python3
"""Launches seqmill.cli.build_index; usable without installing the package."""

import sys

from seqmill.cli.build_index import main

if __name__ == "__main__":
    sys.exit(main())
