#!/usr/bin/env python3
"""fair-esm's own way, as its extract script goes: batches by tokens, float32, mean over residues.

usage: peer_fair_esm.py FASTA CHECKPOINT OUTPUT
"""

import argparse
import sys

import torch
from esm import FastaBatchedDataset
from esm.pretrained import load_model_and_alphabet_core

TOKENS_PER_BATCH = 4096  # its script's default
MAX_LENGTH = 1022

fasta, checkpoint, output = sys.argv[1:]
with torch.serialization.safe_globals([argparse.Namespace]):
    data = torch.load(checkpoint, weights_only=True)
model, alphabet = load_model_and_alphabet_core("esm2", data)
model.eval()
dataset = FastaBatchedDataset.from_file(fasta)
loader = torch.utils.data.DataLoader(
    dataset,
    collate_fn=alphabet.get_batch_converter(MAX_LENGTH),
    batch_sampler=dataset.get_batch_indices(TOKENS_PER_BATCH, extra_toks_per_seq=1),
)
means = {}
with torch.no_grad():
    for labels, sequences, tokens in loader:
        hidden = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
        for number, label in enumerate(labels):
            length = min(MAX_LENGTH, len(sequences[number]))
            means[label] = hidden[number, 1 : length + 1].mean(0).clone()
torch.save(means, output)
