#!/usr/bin/env python3
"""Launches seqmill.cli.report; usable without installing the package."""

import sys

from seqmill.cli.report import main

sys.exit(main())
