#!/usr/bin/env python3
"""Run esm.cpp (PyPI esm-cpp) at its fastest: packed and scheduled by length.

usage: peer_esm_cpp.py FASTA WEIGHTS
       peer_esm_cpp.py FASTA WEIGHTS COUNT OUTPUT
       peer_esm_cpp.py quantize WEIGHTS GGUF

WEIGHTS is a .safetensors or .gguf file. Its packed forward gives logits only, so the first form writes nothing. The
second computes the first COUNT proteins one by one and writes the means of their last hidden states over the residues.
The third makes int8 weights; ESM_AMX_ATTENTION=on in the environment makes their attention faster, in bfloat16.
"""

import sys
from pathlib import Path

import esm_cpp
import numpy as np

MAX_LENGTH = 1022

if sys.argv[1] == "quantize":
    model = esm_cpp.Model.load(sys.argv[2])
    model.quantize_weights()
    model.save_to_gguf(sys.argv[3])
    sys.exit()

fasta, weights = sys.argv[1:3]
tokenizer = esm_cpp.Tokenizer()
proteins = ["".join(record.split("\n")[1:])[:MAX_LENGTH] for record in Path(fasta).read_text().split(">")[1:]]
ids = [np.asarray(tokenizer.encode(protein), np.int32) for protein in proteins]
model = esm_cpp.Model.load(weights)
if len(sys.argv) > 3:
    count, output = int(sys.argv[3]), sys.argv[4]
    means = [model.forward_with_hidden_states(tokens)[1][-1][1:-1].mean(axis=0) for tokens in ids[:count]]
    np.save(output, np.stack(means))
else:
    model.forward_scheduled(sorted(ids, key=len, reverse=True))
