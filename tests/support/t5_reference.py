"""The encoder of T5 by transformers' `T5EncoderModel` on seeded weights, one unpadded sequence at a time."""

import functools
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from seqmill.spec.architectures import T5Architecture

SMALL = T5Architecture(num_layers=3, hidden_dim=64, num_heads=4, key_dim=32, feed_forward_dim=192)  # a ProtT5
SMALL_PROSTT5 = T5Architecture(3, 64, 4, vocabulary=150, key_dim=32, feed_forward_dim=192)
# Their SentencePiece models give each letter a token; see the published tokenizers.
EOS, LETTERS, AA2FOLD = 1, dict(zip("ALGVSREDTIPKFQNYMHWCX", range(3, 24), strict=True)), 149
State = dict[str, torch.Tensor]


def shapes(architecture: T5Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by transformers' names."""
    d, inner, ffn = architecture.hidden_dim, architecture.inner_dim, architecture.ffn_dim
    found: dict[str, tuple[int, ...]] = {
        "shared.weight": (architecture.vocabulary, d),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            architecture.buckets,
            architecture.num_heads,
        ),
        "encoder.final_layer_norm.weight": (d,),
    }
    for number in range(architecture.num_layers):
        block = f"encoder.block.{number}."
        for name in ("q", "k", "v"):
            found[f"{block}layer.0.SelfAttention.{name}.weight"] = (inner, d)
        found[f"{block}layer.0.SelfAttention.o.weight"] = (d, inner)
        found[f"{block}layer.1.DenseReluDense.wi.weight"] = (ffn, d)
        found[f"{block}layer.1.DenseReluDense.wo.weight"] = (d, ffn)
        for part in (0, 1):
            found[f"{block}layer.{part}.layer_norm.weight"] = (d,)
    return found


def seeded_state(architecture: T5Architecture = SMALL, seed: int = 7, score_spread: float = 1.0) -> State:
    """Return nontrivial float32 weights (no unit norm); NumPy's PCG64 gives the same ones everywhere.

    T5 does not scale scores, so its queries are made small: the scores have a spread of about `score_spread`, as have
    the biases by relative position.
    """
    state = {}
    for name, shape in shapes(architecture).items():
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = np.float32(0.1) * values + np.float32(1)
        elif name.endswith("relative_attention_bias.weight"):
            values *= np.float32(score_spread)
        elif name != "shared.weight":
            spread = score_spread * architecture.head_dim**-0.5 if name.endswith(".q.weight") else 1
            values *= np.float32(spread * shape[1] ** -0.5)
        state[name] = torch.from_numpy(values)
    return state


def config_of(architecture: T5Architecture) -> T5Config:
    return T5Config(
        vocab_size=architecture.vocabulary,
        d_model=architecture.hidden_dim,
        d_kv=architecture.key_dim,
        d_ff=architecture.feed_forward_dim,
        num_layers=architecture.num_layers,
        num_heads=architecture.num_heads,
        relative_attention_num_buckets=architecture.buckets,
        relative_attention_max_distance=architecture.max_distance,
    )


def seeded_model(architecture: T5Architecture = SMALL, state: State | None = None) -> T5EncoderModel:
    """Return transformers' encoder with `seeded_state`, or with another state."""
    model = T5EncoderModel(config_of(architecture))
    state = seeded_state(architecture) if state is None else state
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, assign=True)
    return model.eval()


def exact_norms(model: T5EncoderModel) -> T5EncoderModel:
    """Compute the mean square in the dtype of the activations: transformers does so in float32 even in float64."""

    def forward(norm: T5LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * x / (x.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt()

    for module in model.modules():
        if isinstance(module, T5LayerNorm):
            module.forward = functools.partial(forward, module)
    return model


def save_folder(
    folder: Path, architecture: T5Architecture = SMALL, state: State | None = None, shard: str = "50GB"
) -> Path:
    """Save the encoder as a folder of safetensors as transformers does, in files of up to `shard`."""
    seeded_model(architecture, state).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_pickle(folder: Path, architecture: T5Architecture = SMALL, state: State | None = None) -> Path:
    """Save encoder, decoder, and head in float16 as `pytorch_model.bin`, as ProtT5 was first published."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = T5ForConditionalGeneration(config_of(architecture))
    missing, unexpected = whole.load_state_dict(seeded_state(architecture) if state is None else state, strict=False)
    assert not unexpected
    assert all(name.startswith(("decoder.", "lm_head.", "encoder.embed_tokens.")) for name in missing)
    torch.save(whole.half().state_dict(), folder / "pytorch_model.bin")
    whole.config.save_pretrained(folder)
    return folder


def random_tokens(lengths: list[int], architecture: T5Architecture = SMALL, seed: int = 5) -> list[list[int]]:
    """Return seeded proteins of the given numbers of residues as tokens, as `tokens_of`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    letters = list(LETTERS)
    return [tokens_of("".join(generator.choice(letters, length)), architecture) for length in lengths]


def tokens_of(sequence: str, architecture: T5Architecture = SMALL) -> list[int]:
    """Return the tokens of a protein with eos, and for ProstT5 with <AA2fold> before it; U, Z, O, and B become X."""
    letters = [LETTERS.get(letter, LETTERS["X"]) for letter in sequence]
    return [*([AA2FOLD] if architecture.vocabulary > AA2FOLD else []), *letters, EOS]


@torch.no_grad()
def reference_hidden(model: T5EncoderModel, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the hidden states of each layer, (num_layers + 1, tokens, hidden_dim), the last after the final norm.

    The model keeps `dtype`; 16 bits change its weights.
    """
    found = model.to(dtype)(torch.tensor([tokens]), output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    return torch.cat(found.hidden_states)
