#!/usr/bin/env python3
"""Launches seqmill.cli.build_index; usable without installing the package."""

import sys

from seqmill.cli.build_index import main

sys.exit(main())
