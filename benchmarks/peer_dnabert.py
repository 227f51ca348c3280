#!/usr/bin/env python3
"""Run the published code of DNABERT-S with its authors' settings: sorted by length, batches of 20, padded, float32.

usage: peer_dnabert.py PUBLISHED FASTA MODEL OUTPUT

PUBLISHED is a folder with bert_layers.py and bert_padding.py of https://github.com/MAGICS-LAB/DNABERT_S (see
tests/support/dnabert_reference.py), without its Triton kernel, so that it computes in PyTorch. MODEL is a folder with
config.json, tokenizer.json, and pytorch_model.bin. Needs einops and transformers. Prints the seconds of the embedding,
without loading, to stderr.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BertConfig

BATCH = 20  # calculate_llm_embedding in the authors' evaluate/utils.py

published, fasta, model_folder, output = (Path(argument).resolve() for argument in sys.argv[1:])
sys.path.insert(0, str(published.parent))
layers = importlib.import_module(f"{published.name}.bert_layers")
assert layers.flash_attn_qkvpacked_func is None

model = layers.BertModel(BertConfig(**json.loads((model_folder / "config.json").read_text())))
model.load_state_dict(torch.load(model_folder / "pytorch_model.bin", weights_only=True))
model.eval()
tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
tokenizer.enable_padding(pad_id=3, pad_token="[PAD]")

sequences = ["".join(record.split("\n")[1:]) for record in fasta.read_text().split(">")[1:]]
order = np.argsort([len(sequence) for sequence in sequences])
means = []
start = time.perf_counter()
with torch.no_grad():
    for first in range(0, len(order), BATCH):
        batch = tokenizer.encode_batch([sequences[number] for number in order[first : first + BATCH]])
        ids = torch.tensor([encoding.ids for encoding in batch])
        mask = torch.tensor([encoding.attention_mask for encoding in batch])
        hidden = model(input_ids=ids, attention_mask=mask)[0]
        means.append((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
print(time.perf_counter() - start, file=sys.stderr)
np.save(output, torch.cat(means).numpy()[np.argsort(order)])
