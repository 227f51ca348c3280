#!/usr/bin/env python3
"""Launches seqmill.cli.cut_contigs; usable without installing the package."""

import sys

from seqmill.cli.cut_contigs import main

if __name__ == "__main__":
    sys.exit(main())
