"""The specification of a run, as plain values: models, lengths, outputs, packs, tasks."""
