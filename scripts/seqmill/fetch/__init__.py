"""Weights from the network."""

from seqmill.fetch.models import fetch_model

__all__ = ["fetch_model"]
