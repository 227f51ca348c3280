#!/usr/bin/env python3
"""Launches seqmill.cli.embed_shard; usable without installing the package."""

import sys

from seqmill.cli.embed_shard import main

sys.exit(main())
