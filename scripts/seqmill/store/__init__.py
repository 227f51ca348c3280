"""What is on disk between the stages: index, parts, shards, status, embeddings."""
