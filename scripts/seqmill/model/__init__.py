"""From tokens to hidden states: one file per architecture."""
