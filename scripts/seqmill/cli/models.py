"""List the released models: sizes, license, memory, measured speed, and where their weights are on this disk."""

import argparse

EPILOG = """examples:
  seqmill models
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG


def work(arguments: argparse.Namespace) -> None:
    from seqmill.run.model_table import model_table

    print("\n".join(model_table()))
