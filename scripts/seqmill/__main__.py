"""`python -m seqmill`: the same as the command `seqmill`."""

from seqmill.cli.main import main

main()
