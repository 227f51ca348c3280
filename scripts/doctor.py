#!/usr/bin/env python3
"""Launches seqmill.cli.doctor; usable without installing the package."""

import sys

from seqmill.cli.doctor import main

sys.exit(main())
