"""transformers and fair-esm on the same GPU, with the same weights and tokens, timed as `gpu_models` times us.

Both get padded batches of sequences of similar length, of as many tokens as our packs have, with tokens made ahead and
the means taken by one masked sum. As in their scripts, a batch is fetched before the next one is queued.
"""

import time

import numpy as np
import torch
from gpu_models import Measured, Way, worst_cosine
from gpu_packs import CLS, EOS
from gpu_sizes import SIZES

from seqmill.model.elementwise import EAGER
from seqmill.model.esm2_weights import FAIR_ESM, HUGGING_FACE

PAD, MASK = 1, 32
PEERS = (
    *(("transformers", "bfloat16"), ("fair-esm", "float16")),
    *(("transformers", "float16"), ("fair-esm", "float32")),  # of the flagship only
)
MODULES = {"transformers": ("transformers",), "fair-esm": ("esm",)}


def measure_peer(measured: Measured, peer: str, precision: str) -> dict:
    """Return the figures of a peer: batches spread evenly over all lengths, until the time is over."""
    device, dtype = measured.device, getattr(torch, precision)
    model = {"transformers": transformers_model, "fair-esm": fair_esm_model}[peer](measured, dtype)
    batches = padded_batches(measured.packs.sequences())
    order = evenly_spread(len(batches))
    found = embed(model, peer, batches[order[0]].to(device))
    tokens = real_tokens = 0
    start = time.perf_counter()
    for number in order:
        embed(model, peer, batches[number].to(device, non_blocking=True))
        tokens += batches[number].numel()
        real_tokens += int((batches[number] != PAD).sum())
        if time.perf_counter() - start > SIZES.peer_seconds:
            break
    seconds = time.perf_counter() - start
    ours = our_means(measured, measured.make(Way("float32", "sdpa", EAGER)), batches[order[0]])
    return {
        "model": measured.name,
        "peer": peer,
        "precision": precision,
        "tokens": real_tokens,
        "padding": 1 - real_tokens / tokens,
        "seconds": seconds,
        "tokens_per_second": real_tokens / seconds,
        "batch_tokens": SIZES.pack_tokens,
        "worst_cosine_to_ours_in_float32": worst_cosine(found, ours),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", "its own"),
    }


def padded_batches(sequences: list[np.ndarray]) -> list[torch.Tensor]:
    """Return batches of sequences (by descending length) of up to `pack_tokens` padded tokens, in pinned memory."""
    batches, rest = [], sequences
    while rest:
        longest = len(rest[0])
        count = max(SIZES.pack_tokens // longest, 1)
        batch, rest = rest[:count], rest[count:]
        tokens = torch.full((len(batch), longest), PAD)
        for row, sequence in enumerate(batch):
            tokens[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        batches.append(tokens.pin_memory())
    return batches


def evenly_spread(count: int) -> list[int]:
    """Return an order in which any first part is spread evenly over the whole."""
    step = next(step for step in range(int(count * 0.618) or 1, count + 1) if np.gcd(step, count) == 1)
    return [(number * step) % count for number in range(count)]


def embed(model: torch.nn.Module, peer: str, tokens: torch.Tensor) -> np.ndarray:
    """Return the means over the residues of a batch, on the host."""
    with torch.inference_mode():
        if peer == "transformers":
            hidden = model(tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
        else:
            last = model.num_layers
            hidden = model(tokens, repr_layers=[last])["representations"][last]
        residues = ((tokens != PAD) & (tokens != CLS) & (tokens != EOS)).unsqueeze(-1)
        return ((hidden.float() * residues).sum(1) / residues.sum(1)).cpu().numpy()


def our_means(measured: Measured, model: torch.nn.Module, batch: torch.Tensor) -> np.ndarray:
    from seqmill.model.pack import Pack

    rows = [row[row != PAD].numpy().astype(np.int32) for row in batch]
    pack = Pack.from_tokens(np.concatenate(rows), np.array([len(row) for row in rows], np.int64))
    pack = Pack(pack.tokens.to(measured.device), pack.cu_seqlens.to(measured.device), pack.lengths)
    return measured.embedder(model)(pack).rows.cpu().numpy()


def renamed(measured: Measured, naming: object) -> dict[str, torch.Tensor]:
    """Return the weights by a peer's names."""
    tensors = {}
    for parameter, tensor in measured.tensors.items():
        names = naming.names_of(parameter)
        tensors.update(zip(names, tensor.chunk(len(names)), strict=True))
    return tensors


def load(model: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"this version has no parameter {unexpected[0]}")
    return model.eval().to(dtype)


def transformers_model(measured: Measured, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import EsmConfig, EsmModel

    shape = measured.architecture
    config = EsmConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.ffn_dim,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        layer_norm_eps=1e-5,
        pad_token_id=PAD,
        mask_token_id=MASK,
        attn_implementation="sdpa",
    )
    with measured.device:
        model = EsmModel(config, add_pooling_layer=False)
    return load(model, renamed(measured, HUGGING_FACE), dtype)


def fair_esm_model(measured: Measured, dtype: torch.dtype) -> torch.nn.Module:
    import esm

    shape = measured.architecture
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    with measured.device:
        model = esm.ESM2(shape.num_layers, shape.hidden_dim, shape.num_heads, alphabet, token_dropout=True)
    return load(model, renamed(measured, FAIR_ESM), dtype)
