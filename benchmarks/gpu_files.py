"""Runs from FASTA to HDF5 on a GPU, as the workflow makes them, and how long the GPU waits for the host in them."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from gpu_sizes import DNABERT, SIZES
from proteins import random_contigs, random_proteins, write_fasta

from seqmill.embedding.embedder import PackEmbedder

RATES = {"8M": 2e6, "650M": 2e5, "3B": 5e4, DNABERT: 3e5}  # tokens/s, a guess for models that were not measured
BASES_PER_TOKEN, RESIDUES_PER_PROTEIN, BASES_PER_CONTIG = 4.9, 360, 2700


def file_run(folder: Path, model: str, rate: float | None) -> dict:
    """Return the figures of a run in bfloat16: index, shard without audit, merge; `rate` is the model's tokens/s."""
    from seqmill.embedding.worker import embed_shard
    from seqmill.index.build import build_index
    from seqmill.merge.merge import merge_shards
    from seqmill.spec.lengths import LengthPolicy
    from seqmill.spec.task import ComputeSettings, ShardTask
    from seqmill.store.layout import status_path_of

    rate = rate or next((rate for name, rate in RATES.items() if name in model), 1e5)
    fasta, index, shard = folder / f"{model}.fasta", folder / f"{model}.index.h5", folder / "shard_0-of-1.h5"
    sequences = write_sequences(fasta, model, int(min(rate * SIZES.file_seconds, SIZES.file_tokens)))
    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    build_index(fasta, index, f"untrained:{model}", LengthPolicy())
    indexed = time.perf_counter()
    settings = ComputeSettings("cuda", "bfloat16")
    task = ShardTask(index, 0, 1, shard, status_path_of(shard), settings, audit_seconds=0)
    with packs_timed() as waiting:
        done = embed_shard(task)
    embedded = time.perf_counter()
    outputs = (folder / name for name in (f"{model}.embeddings.h5", "records.tsv.gz", "manifest.json"))
    merge_shards(index, [shard], [task.status], *outputs)
    end = time.perf_counter()
    tokens, seconds = done.run.num_tokens or 0, done.seconds
    return {
        "model": model,
        "sequences": sequences,
        "tokens": tokens,
        "seconds": end - start,
        "stages": {"index": indexed - start, **seconds, "merge": end - embedded},
        "tokens_per_second": tokens / (end - start),
        "tokens_per_second_computing": done.run.tokens_per_second,
        "between_packs": waiting() / seconds["compute"],
        "gpu_utilization_mean": done.run.gpu_utilization_mean,
        "model_flop_utilization": done.run.model_flop_utilization,
        "attention": done.run.attention,
        "elementwise": done.run.elementwise,
    }


def write_sequences(path: Path, model: str, tokens: int) -> int:
    """Write a FASTA with about so many tokens; return the number of sequences."""
    if model == DNABERT:
        sequences = random_contigs(max(int(tokens * BASES_PER_TOKEN / BASES_PER_CONTIG), 4))
    else:
        sequences = random_proteins(max(tokens // RESIDUES_PER_PROTEIN, 4))
    write_fasta(path, sequences)
    return len(sequences)


@contextmanager
def packs_timed() -> Iterator[Callable[[], float]]:
    """Time on the device where each pack begins and ends; yield a function that returns the seconds between packs.

    Then the device has nothing to compute, because the host has not queued the next pack.
    """
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    compute = PackEmbedder.__call__

    def timed(embed: PackEmbedder, pack: object) -> object:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        vectors = compute(embed, pack)
        last.record()
        events.append((first, last))
        return vectors

    def between() -> float:
        torch.cuda.synchronize()
        packs = events[1:]  # the first one is the warm-up's
        gaps = [last.elapsed_time(first) for (_, last), (first, _) in pairwise(packs)]
        return sum(gaps) / 1e3

    PackEmbedder.__call__ = timed
    try:
        yield between
    finally:
        PackEmbedder.__call__ = compute
