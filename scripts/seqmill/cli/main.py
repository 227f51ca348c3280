"""`seqmill NAME ...`: each program of the workflow as a subcommand."""

import sys
from importlib import import_module

# In the order of the pipeline.
PROGRAMS = {
    "fetch_weights": "download the weights of a released model and test them",
    "plan": "forecast what a run needs: shards, time, disk, memory",
    "build_index": "read a FASTA file: validate, deduplicate, tokenize, pack",
    "embed_shard": "compute the embeddings of one shard of an index",
    "merge_shards": "verify all shards and merge them in the order of the FASTA",
    "report": "write a report on a result as a page of HTML",
    "export": "write embeddings in another program's format",
    "search": "find the nearest neighbors among embeddings",
    "watch": "show how far runs have come",
    "doctor": "check results and name the next step",
}
USAGE = "\n".join(
    [
        "usage: seqmill NAME [options]\n",
        *(f"  {name:<15}{line}" for name, line in PROGRAMS.items()),
        "\n`seqmill NAME --help` explains the options.",
    ]
)


def main() -> int:
    """Run the program that the first argument names; return its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name not in PROGRAMS:
        sys.exit(f"{USAGE}\n\nseqmill: {name!r} is none of these names" if name else USAGE)
    del sys.argv[1]
    sys.argv[0] = f"seqmill {name}"
    return import_module(f"seqmill.cli.{name}").main()
