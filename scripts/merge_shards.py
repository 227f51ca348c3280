#!/usr/bin/env python3
"""Launches seqmill.cli.merge_shards; usable without installing the package."""

import sys

from seqmill.cli.merge_shards import main

sys.exit(main())
