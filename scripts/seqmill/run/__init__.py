"""A run seen from outside: settings, datasets, resources, progress, repair."""
