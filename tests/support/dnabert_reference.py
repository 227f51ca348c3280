"""A reference implementation of DNABERT-S on seeded weights: padded, with every bias and score written out.

`GOLDEN` holds numbers computed by the published code, which is not in this repository. To compute them again:

1. From https://github.com/MAGICS-LAB/DNABERT_S at commit ac01b55e5034182e4b915d34ce5a3a323b82adb8 copy
   `evaluate/model_codes/{bert_layers.py,config.json}` and `train/pretrain/DNABERT2_MIX/bert_padding.py` into one
   package without flash_attn_triton, so that it computes in PyTorch. It needs einops and transformers.
2. Create `BertModel(BertConfig(**config))` with num_hidden_layers 3, call `load_state_dict(seeded_state(SMALL))`, which
   is strict, and then `.double().eval()`.
3. Run `random_tokens(GOLDEN_LENGTHS)` as one batch padded with 0, with its attention mask.
4. A sequence's row has the first three values and the norm of its mean over all tokens, and the last three values of
   its last token.

Made with torch 2.13.0 (CPU), transformers 5.23.0 and einops 0.8.2.
"""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from seqmill.model.pack import Pack
from seqmill.spec.architectures import DnabertArchitecture
from seqmill.spec.models import UNTRAINED_TOKENIZER

SMALL = DnabertArchitecture(num_layers=3)
GOLDEN_LENGTHS = [521, 64, 64, 3, 1]
GOLDEN = [
    (
        [-0.565668573336077, -0.7343800507248334, 0.5632213431893525],
        25.101264852836447,
        [-0.15165790515537061, -0.10086487875991113, 2.5156710836356795],
    ),
    (
        [-0.583280804026981, -0.41838535582251063, 0.6060887408037513],
        25.219833586645905,
        [-0.4770974812657965, 0.6568085513558174, 2.211019049705933],
    ),
    (
        [-0.6227921434532673, -0.5446877407939437, 0.7017786529454446],
        25.02348830576034,
        [-0.710347315430899, -0.10973583498741049, 0.3534518699555933],
    ),
    (
        [-0.23311402522704516, -0.2350570000732448, 1.093244649871374],
        26.545087744866773,
        [-0.6626880384663894, 0.2860295914865873, 1.258373354884922],
    ),
    (
        [-2.0271904696036165, 1.6661922395300597, 0.20272059406135695],
        27.759680466756883,
        [0.31442378274361626, 0.28212210929123754, 0.5426855494902719],
    ),
]

State = dict[str, torch.Tensor]


def seeded_state(architecture: DnabertArchitecture, seed: int = 7) -> State:
    """Return nontrivial weights (no zero bias, no unit norm) under the names of the published code.

    They come from NumPy's PCG64, so every version of torch gives the same weights.
    """
    d, ffn = architecture.hidden_dim, 4 * architecture.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (architecture.vocabulary, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
    }
    for number in range(architecture.num_layers):
        layer = f"encoder.layer.{number}."
        shapes |= {
            f"{layer}attention.self.Wqkv.weight": (3 * d, d),
            f"{layer}attention.self.Wqkv.bias": (3 * d,),
            f"{layer}attention.output.dense.weight": (d, d),
            f"{layer}attention.output.dense.bias": (d,),
            f"{layer}attention.output.LayerNorm.weight": (d,),
            f"{layer}attention.output.LayerNorm.bias": (d,),
            f"{layer}mlp.gated_layers.weight": (2 * ffn, d),
            f"{layer}mlp.wo.weight": (d, ffn),
            f"{layer}mlp.wo.bias": (d,),
            f"{layer}mlp.layernorm.weight": (d,),
            f"{layer}mlp.layernorm.bias": (d,),
        }
    state = {}
    for name, shape in shapes.items():
        values = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())])).standard_normal(shape)
        if name.endswith("embeddings.weight"):
            pass
        elif len(shape) == 2:
            values *= shape[1] ** -0.5
        else:
            values = 0.1 * values + ("norm" in name.lower() and name.endswith(".weight"))
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def random_tokens(lengths: list[int], seed: int = 5) -> list[np.ndarray]:
    """Return seeded token ids from the whole vocabulary, including 0 and 3: no id is padding."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return [generator.integers(0, 4096, length).astype(np.uint16) for length in lengths]


def one_pack(sequences: list[np.ndarray]) -> Pack:
    return Pack.from_tokens(np.concatenate(sequences), np.array([len(s) for s in sequences], np.int64))


def save_folder(state: State, architecture: DnabertArchitecture, folder: Path) -> Path:
    """Save a model as DNABERT-S is published: a configuration of BERT with ALiBi, a tokenizer, and a pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(UNTRAINED_TOKENIZER, folder / "tokenizer.json")
    config = {
        "model_type": "bert",
        "alibi_starting_size": 512,
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": architecture.hidden_dim,
        "intermediate_size": 4 * architecture.hidden_dim,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": architecture.num_heads,
        "num_hidden_layers": architecture.num_layers,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": architecture.token_types,
        "vocab_size": architecture.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def slopes_written_out(num_heads: int) -> list[float]:
    """Return the heads' slopes: a geometric series for a power of two, else two interleaved series."""
    if num_heads & (num_heads - 1) == 0:
        first = 2.0 ** (-8.0 / num_heads)
        return [first**head for head in range(1, num_heads + 1)]
    below = 2 ** int(math.log2(num_heads))
    return slopes_written_out(below) + slopes_written_out(2 * below)[::2][: num_heads - below]


@torch.no_grad()
def reference_hidden(
    state: State, architecture: DnabertArchitecture, sequences: list[np.ndarray], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return each sequence's hidden states after the last layer, (tokens, hidden_dim), computed as one padded batch."""
    weights = {name: tensor.to(dtype) for name, tensor in state.items()}
    heads, d = architecture.num_heads, architecture.hidden_dim
    batch, longest = len(sequences), max(map(len, sequences))
    ids = torch.zeros(batch, longest, dtype=torch.long)
    is_token = torch.zeros(batch, longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        is_token[row, : len(sequence)] = True

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(dim=-1, keepdim=True)
        scaled = centered / (centered.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    # Always float32, as in the published code.
    places = torch.arange(longest, dtype=torch.float32)
    distance = (places[:, None] - places[None, :]).abs()
    bias = -torch.tensor(slopes_written_out(heads), dtype=torch.float32)[:, None, None] * distance
    bias = bias[None].to(dtype).masked_fill(~is_token[:, None, None, :], -math.inf)

    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for number in range(architecture.num_layers):
        layer = f"encoder.layer.{number}."
        projected = linear(x, f"{layer}attention.self.Wqkv").view(batch, longest, 3, heads, d // heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhqc,bhkc->bhqk", q, k) / math.sqrt(d // heads) + bias
        attended = torch.einsum("bhqk,bhkc->bqhc", scores.softmax(dim=-1), v).reshape(batch, longest, d)
        x = norm(linear(attended, f"{layer}attention.output.dense") + x, f"{layer}attention.output.LayerNorm")
        wide = x @ weights[f"{layer}mlp.gated_layers.weight"].T
        gate, value = wide[..., : 4 * d], wide[..., 4 * d :]
        activated = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2)))
        x = norm(linear(activated * value, f"{layer}mlp.wo") + x, f"{layer}mlp.layernorm")
    return [x[row, : len(sequence)] for row, sequence in enumerate(sequences)]
