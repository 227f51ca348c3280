#!/usr/bin/env python3
"""Run esm.cpp (PyPI esm-cpp) at its fastest: packed and scheduled by length, in float32 or int8.

usage: peer_esm_cpp.py FASTA SAFETENSORS float32|int8 [COUNT OUTPUT]

Its packed forward gives logits only, so nothing is written. With COUNT, computes the first proteins one by one instead,
and writes the means of their last hidden states over the residues, to compare them.
"""

import sys
from pathlib import Path

import esm_cpp
import numpy as np

MAX_LENGTH = 1022

fasta, weights, precision = sys.argv[1:4]
tokenizer = esm_cpp.Tokenizer()
proteins = ["".join(record.split("\n")[1:])[:MAX_LENGTH] for record in Path(fasta).read_text().split(">")[1:]]
ids = [np.asarray(tokenizer.encode(protein), np.int32) for protein in proteins]
model = esm_cpp.Model.load_from_safetensors(weights)
if precision == "int8":
    model.quantize_weights()
if len(sys.argv) > 4:
    count, output = int(sys.argv[4]), sys.argv[5]
    means = [model.forward_with_hidden_states(tokens)[1][-1][1:-1].mean(axis=0) for tokens in ids[:count]]
    np.save(output, np.stack(means))
else:
    model.forward_scheduled(sorted(ids, key=len, reverse=True))
