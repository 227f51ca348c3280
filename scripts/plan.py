#!/usr/bin/env python3
"""Launches seqmill.cli.plan; usable without installing the package."""

import sys

from seqmill.cli.plan import main

sys.exit(main())
