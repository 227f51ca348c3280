#!/usr/bin/env python3
"""Launches seqmill.cli.fetch_weights; usable without installing the package."""

import sys

from seqmill.cli.fetch_weights import main

sys.exit(main())
