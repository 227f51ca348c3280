"""The models: a registry of names, one readable file per architecture, and their weights."""
