"""ESM C by transformers' `EsmcModel` on seeded weights, one unpadded sequence at a time."""

import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import EsmcConfig, EsmcModel

from seqmill.spec.models import EsmcArchitecture

SMALL = EsmcArchitecture(num_layers=3, hidden_dim=128, num_heads=2)
CLS, EOS, LETTERS = 0, 2, dict(zip("LAGVSERTIDPKQNFYMHWCXBUZO", range(4, 29), strict=True))  # as in ESM-2
State = dict[str, torch.Tensor]


def shapes(architecture: EsmcArchitecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by transformers' names, which the published safetensors have too."""
    d, ffn = architecture.hidden_dim, architecture.ffn_dim
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (architecture.vocabulary, d), "norm.weight": (d,)}
    for number in range(architecture.num_layers):
        layer = f"layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = found[f"{layer}{name}.bias"] = (d,)
        for name in ("q_norm", "k_norm"):
            found[f"{layer}self_attn.{name}.weight"] = (d,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{layer}self_attn.{name}.weight"] = (d, d)
        for name in ("gate_proj", "up_proj"):
            found[f"{layer}mlp.{name}.weight"] = (ffn, d)
        found[f"{layer}mlp.down_proj.weight"] = (d, ffn)
    return found


def seeded_state(architecture: EsmcArchitecture = SMALL, seed: int = 7) -> State:
    """Return nontrivial float32 weights (no zero bias, no unit norm); NumPy's PCG64 gives the same ones everywhere."""
    state = {}
    for name, shape in shapes(architecture).items():
        generator = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        values = generator.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = np.float32(0.1) * values + np.float32(name.endswith("norm.weight"))
        elif name != "embed_tokens.weight":
            values *= np.float32(shape[1] ** -0.5)
        state[name] = torch.from_numpy(values)
    return state


def seeded_model(architecture: EsmcArchitecture = SMALL, state: State | None = None) -> EsmcModel:
    """Return transformers' model with `seeded_state`, or with another state."""
    config = EsmcConfig(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.hidden_dim,
        intermediate_size=architecture.ffn_dim,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
    )
    model = EsmcModel(config)
    model.load_state_dict(seeded_state(architecture) if state is None else state, assign=True)
    return model.eval()


def save_folder(
    folder: Path, architecture: EsmcArchitecture = SMALL, state: State | None = None, shard: str = "50GB"
) -> Path:
    """Save a folder of safetensors as transformers does, in files of up to `shard`."""
    seeded_model(architecture, state).save_pretrained(folder, max_shard_size=shard)
    return folder


def tokens_of(sequence: str) -> list[int]:
    """Return the tokens of a protein, with cls and eos."""
    return [CLS, *(LETTERS[letter] for letter in sequence), EOS]


@torch.no_grad()
def reference_hidden(model: EsmcModel, tokens: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the hidden states of each layer, (num_layers + 1, tokens, hidden_dim), the last after the final norm.

    The model keeps `dtype`; 16 bits change its weights.
    """
    found = model.to(dtype)(torch.tensor([tokens]), output_hidden_states=True)
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    return torch.cat(found.hidden_states)
