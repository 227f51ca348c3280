"""Embeddings in the formats of other programs."""
