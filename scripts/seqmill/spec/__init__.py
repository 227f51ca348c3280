"""What is asked for, as plain values: models, lengths, outputs, packs, the task."""
