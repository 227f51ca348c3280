#!/usr/bin/env python3
"""Run transformers' EsmModel with scaled_dot_product_attention, batches sorted by length, mean over residues.

usage: peer_transformers.py FASTA FOLDER DTYPE OUTPUT [DEVICE]

Prints the seconds of the embedding, without loading, to stderr; on CUDA after a warm-up batch.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from Bio.SeqIO.FastaIO import SimpleFastaParser
from transformers import EsmModel

MAX_LENGTH = 1022
LETTERS = {letter: token for token, letter in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO", start=4)}

fasta, folder, dtype, output, device = [*sys.argv[1:], "cpu"][:5]
tokens_per_batch = 4096 if device == "cpu" else 32768
model = EsmModel.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", add_pooling_layer=False
)
model = model.eval().to(device)
with Path(fasta).open() as file:
    sequences = [sequence[:MAX_LENGTH] for _, sequence in SimpleFastaParser(file)]
order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
means = np.empty((len(sequences), model.config.hidden_size), np.float32)


def embed(batch: list[int]) -> None:
    longest = len(sequences[batch[0]]) + 2
    tokens = torch.full((len(batch), longest), 1)
    for row, number in enumerate(batch):
        ids = [0, *(LETTERS[letter] for letter in sequences[number]), 2]
        tokens[row, : len(ids)] = torch.tensor(ids)
    tokens = tokens.to(device)
    hidden = model(tokens, attention_mask=(tokens != 1).long()).last_hidden_state.float()
    rows = [hidden[row, 1 : len(sequences[number]) + 1].mean(0) for row, number in enumerate(batch)]
    means[batch] = torch.stack(rows).cpu().numpy()


batches = []
while order:
    size = max(tokens_per_batch // (len(sequences[order[0]]) + 2), 1)
    batches.append(order[:size])
    order = order[size:]
with torch.inference_mode():
    if device != "cpu":
        embed(batches[0])
    start = time.perf_counter()
    for batch in batches:
        embed(batch)
    print(time.perf_counter() - start, file=sys.stderr)
np.save(output, means)
