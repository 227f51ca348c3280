"""Write a report on a result: one HTML page with a map of the embeddings, which needs no network."""

import argparse
from pathlib import Path

from seqmill.store.layout import RunFolder

EPILOG = """examples:
  seqmill report --embeddings embeddings.h5 --output report.html
  seqmill report --embeddings embeddings.h5 --metadata families.tsv --color family --output report.html
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--embeddings", type=Path, required=True, help="the embeddings.h5 to report on")
    parser.add_argument("--output", type=Path, required=True, help="the page to write (report.html)")
    others = parser.add_argument_group("other files of the result")
    others.add_argument(
        "--records", type=Path, help="its table of fates (default: records.tsv.gz in its folder, if any)"
    )
    others.add_argument("--manifest", type=Path, help="its manifest (default: manifest.json in its folder, if any)")
    others.add_argument("--index", type=Path, help="its index, for the packs (default: index.h5 in its folder, if any)")
    others.add_argument(
        "--statuses", type=Path, nargs="+", default=[], help="the shards' status JSONs, if there is no manifest"
    )
    colors = parser.add_argument_group("colors of the map")
    colors.add_argument(
        "--metadata", type=Path, help="a tab-separated table with a header line and ids in its first column"
    )
    colors.add_argument("--color", help="the column of the metadata that colors the map: numbers or categories")


def work(arguments: argparse.Namespace) -> None:
    if (arguments.metadata is None) != (arguments.color is None):
        raise argparse.ArgumentTypeError(
            "--metadata and --color go together: a table, and its column that colors the map"
        )
    from seqmill.report.data import Sources
    from seqmill.report.page import write_report

    given, folder = arguments, RunFolder(arguments.embeddings.parent)
    pairs = ((given.records, folder.records), (given.manifest, folder.manifest), (given.index, folder.index))
    others = [path or (default if default.exists() else None) for path, default in pairs]
    sources = Sources(given.embeddings, *others, given.statuses, given.metadata, given.color or "")
    write_report(sources, arguments.output)
