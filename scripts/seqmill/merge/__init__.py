"""From verified shards to embeddings.h5, records.tsv.gz and manifest.json."""
