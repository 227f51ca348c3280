"""The command `seqmill` and the programs of the workflow."""
