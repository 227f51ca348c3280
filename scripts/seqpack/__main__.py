"""`seqpack watch`: the programs that need no workflow."""

import sys

from seqpack import watch

PROGRAMS = {"watch": watch.main}


def main() -> None:
    """Run the program that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: seqpack {'|'.join(PROGRAMS)} ...")
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))


if __name__ == "__main__":
    main()
