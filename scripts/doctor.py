#!/usr/bin/env python3
"""Launches seqmill.cli.doctor; usable without installing the package."""

import sys

from seqmill.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
