#!/usr/bin/env python3
"""Run fair-esm as its extract script does: batches by tokens, float32, mean over residues.

usage: peer_fair_esm.py FASTA CHECKPOINT OUTPUT [DEVICE [DTYPE]]

Prints the seconds of the embedding, without loading, to stderr; on CUDA after a warm-up batch.
"""

import argparse
import sys
import time

import torch
from esm import FastaBatchedDataset
from esm.pretrained import load_model_and_alphabet_core

TOKENS_PER_BATCH = 4096  # its script's default
MAX_LENGTH = 1022

fasta, checkpoint, output, device, dtype = [*sys.argv[1:], *("cpu", "float32")[len(sys.argv) - 4 :]]
with torch.serialization.safe_globals([argparse.Namespace]):
    data = torch.load(checkpoint, weights_only=True)
model, alphabet = load_model_and_alphabet_core("esm2", data)
model = model.eval().to(device, getattr(torch, dtype))
dataset = FastaBatchedDataset.from_file(fasta)
loader = torch.utils.data.DataLoader(
    dataset,
    collate_fn=alphabet.get_batch_converter(MAX_LENGTH),
    batch_sampler=dataset.get_batch_indices(TOKENS_PER_BATCH, extra_toks_per_seq=1),
)
means = {}


def embed(labels: list[str], sequences: list[str], tokens: torch.Tensor) -> None:
    tokens = tokens.to(device, non_blocking=True)
    hidden = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers].to("cpu")
    for number, label in enumerate(labels):
        length = min(MAX_LENGTH, len(sequences[number]))
        means[label] = hidden[number, 1 : length + 1].mean(0).clone()


with torch.no_grad():
    if device != "cpu":
        embed(*next(iter(loader)))
    start = time.perf_counter()
    for labels, sequences, tokens in loader:
        embed(labels, sequences, tokens)
    print(time.perf_counter() - start, file=sys.stderr)
torch.save(means, output)
