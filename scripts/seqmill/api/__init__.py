"""seqmill in Python: embed sequences, read results."""
