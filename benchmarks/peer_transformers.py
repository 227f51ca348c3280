#!/usr/bin/env python3
"""transformers' EsmModel with scaled_dot_product_attention, batches sorted by length, mean over residues.

usage: peer_transformers.py FASTA FOLDER DTYPE OUTPUT
"""

import sys
from pathlib import Path

import numpy as np
import torch
from Bio.SeqIO.FastaIO import SimpleFastaParser
from transformers import EsmModel

TOKENS_PER_BATCH = 4096
MAX_LENGTH = 1022
LETTERS = {letter: token for token, letter in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO", start=4)}

fasta, folder, dtype, output = sys.argv[1:]
model = EsmModel.from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation="sdpa", add_pooling_layer=False
).eval()
with Path(fasta).open() as file:
    sequences = [sequence[:MAX_LENGTH] for _, sequence in SimpleFastaParser(file)]
order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
means = np.empty((len(sequences), model.config.hidden_size), np.float32)
with torch.inference_mode():
    while order:
        size = max(TOKENS_PER_BATCH // (len(sequences[order[0]]) + 2), 1)
        batch, order = order[:size], order[size:]
        longest = len(sequences[batch[0]]) + 2
        tokens = torch.full((len(batch), longest), 1)
        for row, number in enumerate(batch):
            ids = [0, *(LETTERS[letter] for letter in sequences[number]), 2]
            tokens[row, : len(ids)] = torch.tensor(ids)
        mask = (tokens != 1).long()
        hidden = model(tokens, attention_mask=mask).last_hidden_state.float()
        for row, number in enumerate(batch):
            means[number] = hidden[row, 1 : len(sequences[number]) + 1].mean(0).numpy()
np.save(output, means)
