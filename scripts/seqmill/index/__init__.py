"""From a FASTA file to index.h5."""
