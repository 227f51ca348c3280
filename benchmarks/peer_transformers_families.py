#!/usr/bin/env python3
"""Run transformers' EsmcModel or T5EncoderModel with scaled_dot_product_attention; mean over residues.

usage: peer_transformers_families.py FASTA FOLDER MAX_LENGTH DTYPE WAY OUTPUT

WAY is `order` (padded batches of 8 sequences in the order of the file, as in the models' examples), `sorted` (padded
batches of 4,096 tokens, sorted by length), or `single` (one sequence at a time, without padding).
Prints the seconds of the embedding, without loading, to stderr.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from Bio.SeqIO.FastaIO import SimpleFastaParser
from transformers import AutoConfig, EsmcModel, T5EncoderModel

PAD_TOKENS, BATCH, TOKENS_PER_BATCH = {"esmc": 1, "t5": 0}, 8, 4096
ESMC = ([0], dict(zip("LAGVSERTIDPKQNFYMHWCXBUZO", range(4, 29), strict=True)), [2])
T5 = ([], dict(zip("ALGVSREDTIPKFQNYMHWCX", range(3, 24), strict=True)), [1])

fasta, folder, max_length, dtype, way, output = sys.argv[1:]
kind = AutoConfig.from_pretrained(folder).model_type
model = (EsmcModel if kind == "esmc" else T5EncoderModel).from_pretrained(
    folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
)
model.eval()
before, letters, after = ESMC if kind == "esmc" else T5
with Path(fasta).open() as file:
    sequences = [sequence[: int(max_length)] for _, sequence in SimpleFastaParser(file)]
means = np.empty((len(sequences), model.config.hidden_size), np.float32)


def embed(batch: list[int]) -> None:
    rows = [[*before, *(letters[letter] for letter in sequences[number]), *after] for number in batch]
    tokens = torch.full((len(batch), max(map(len, rows))), PAD_TOKENS[kind])
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    hidden = model(input_ids=tokens, attention_mask=mask if len(batch) > 1 else None).last_hidden_state
    for row, number in enumerate(batch):
        means[number] = hidden[row, len(before) : len(before) + len(sequences[number])].float().mean(0).numpy()


order = list(range(len(sequences)))
if way == "sorted":
    order.sort(key=lambda number: -len(sequences[number]))
start = time.perf_counter()
with torch.inference_mode():
    while order:
        longest = len(sequences[order[0]]) + len(before) + len(after)
        size = {"order": BATCH, "sorted": max(TOKENS_PER_BATCH // longest, 1), "single": 1}[way]
        embed(order[:size])
        order = order[size:]
print(time.perf_counter() - start, file=sys.stderr)
np.save(output, means)
