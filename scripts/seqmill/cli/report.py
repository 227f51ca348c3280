"""Write a report on a result: one page of HTML, with a map of the embeddings, that opens without a network."""

import argparse
from pathlib import Path

from seqmill.cli import program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embeddings", type=Path, required=True, help="the embeddings.h5 to report on")
    parser.add_argument("--records", type=Path, help="its table of fates (default: records.tsv.gz beside it, if there)")
    parser.add_argument("--manifest", type=Path, help="its manifest (default: manifest.json beside it, if there)")
    parser.add_argument("--index", type=Path, help="its index, for the packs (default: index.h5 beside it, if there)")
    parser.add_argument(
        "--statuses", type=Path, nargs="+", default=[], help="the shards' status JSONs, where there is no manifest"
    )
    parser.add_argument(
        "--metadata", type=Path, help="a tab-separated table with a header line and ids in its first column"
    )
    parser.add_argument("--color", help="the column of the metadata that colors the map: numbers or categories")
    parser.add_argument("--output", type=Path, required=True, help="the page to write (report.html)")
    arguments = parser.parse_args()
    if (arguments.metadata is None) != (arguments.color is None):
        parser.error("--metadata and --color go together: a table, and the column of it that colors the map")
    return arguments


def main() -> int:
    program.start_log()
    arguments = parse_arguments()

    def beside(given: Path | None, name: str) -> Path | None:
        path = arguments.embeddings.with_name(name)
        return given or (path if path.exists() else None)

    def work() -> None:
        from seqmill.report.data import Sources
        from seqmill.report.page import write_report

        sources = Sources(
            arguments.embeddings,
            beside(arguments.records, "records.tsv.gz"),
            beside(arguments.manifest, "manifest.json"),
            beside(arguments.index, "index.h5"),
            arguments.statuses,
            arguments.metadata,
            arguments.color or "",
        )
        write_report(sources, arguments.output)

    return program.run(work)
