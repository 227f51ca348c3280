"""From index.h5 to a shard: the worker of one rank."""
