#!/usr/bin/env python3
from seqmill.cli.main import launch

launch("models")
