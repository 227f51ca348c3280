#!/usr/bin/env python3
"""Launches seqmill.cli.search; usable without installing the package."""

import sys

from seqmill.cli.search import main

sys.exit(main())
