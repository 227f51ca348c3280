#!/usr/bin/env python3
"""Launches seqmill.cli.watch; usable without installing the package."""

import sys

from seqmill.cli.watch import main

sys.exit(main())
