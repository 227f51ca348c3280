"""The version, which the files that seqmill writes carry."""

__version__ = "0.1.0"
