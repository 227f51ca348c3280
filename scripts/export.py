#!/usr/bin/env python3
"""Launches seqmill.cli.export; usable without installing the package."""

import sys

from seqmill.cli.export import main

sys.exit(main())
